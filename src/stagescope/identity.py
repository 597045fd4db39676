"""W3C Trace Context and baggage, as bytes of a header and back.

Formats: https://www.w3.org/TR/trace-context/#traceparent-header and
https://www.w3.org/TR/baggage/. Parsing never raises: what is malformed counts as absent,
as the specification asks. At the end: which stagescope
this is, and which boot of the host.
"""

from __future__ import annotations

import re
from binascii import Error as HexError
from binascii import unhexlify
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from struct import Struct

from stagescope.errors import UsageError

_GOLDEN = 0x9E3779B97F4A7C15
"""2**64 divided by the golden ratio, odd: multiplying by it maps 64 bits onto 64 bits."""

RUN_KEY = "stagescope.run"
MAX_BAGGAGE_BYTES = 8192
RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
"""A run id is also a file name, so it holds no separators and fits a slot (40 bytes)."""

_RUN_FIELD = RUN_KEY.encode() + b"="
_DASH = ord("-")
_ONLY_LOWER_HEX = bytes(byte if chr(byte) in "0123456789abcdef" else 0 for byte in range(256))
_FIELDS = Struct(">B16s8sB")
_NO_TRACE = bytes(16)
_NO_SPAN = bytes(8)


TraceParent = tuple[bytes, bytes, bool]
"""Trace id (16 bytes), span id (8 bytes), sampled flag; a bare tuple, made for each request."""


def parse_traceparent(value: bytes) -> TraceParent | None:
    """Parse a `traceparent` value; None where the specification calls it invalid."""
    if len(value) != 55:
        # A version after 00 may append fields behind a dash; version 00 may not.
        if len(value) < 57 or value[55] != _DASH or value[:2] == b"00":
            return None
        value = value[:55]
    # One pass takes the dashes out and makes what is no lower-case hex digit unreadable.
    digits = value.translate(_ONLY_LOWER_HEX, b"-")
    if not value[2] == value[35] == value[52] == _DASH or len(digits) != 52:
        return None
    try:
        version, trace_id, span_id, flags = _FIELDS.unpack(unhexlify(digits))
    except HexError:
        return None
    if version == 255 or trace_id == _NO_TRACE or span_id == _NO_SPAN:
        return None
    return trace_id, span_id, flags & 1 == 1


def format_traceparent(trace_id: str, span_id: str, *, sampled: bool = True) -> str:
    """Return the `traceparent` value of hex *trace_id* (32 digits) and *span_id* (16 digits)."""
    return f"00-{trace_id}-{span_id}-0{int(sampled)}"


def stage_span_id(owner: int, start_ns: int, twin: int = 0) -> int:
    """Derive the id of the span of a stage that opened *start_ns* (0 or more) after its timeline.

    *owner* is the span id of the timeline's own span. The served process derives it when the
    stage opens, so that the app's own spans nest under it, and an exporter when it makes the
    span; neither has to tell the other. Of stages of one timeline that open in the same
    nanosecond *twin* counts from 0: the served process knows the first alone.
    """
    return (owner + (start_ns + (twin << 48) + 1) * _GOLDEN) % 2**64 or 1


def parse_run(baggage: bytes) -> bytes:
    """Find the load run's id in a `baggage` value; empty where there is none or it is not one."""
    if _RUN_FIELD not in baggage or len(baggage) > MAX_BAGGAGE_BYTES:
        return b""
    for member in baggage.split(b","):
        key, _, value = member.partition(b"=")
        if key.strip() == _RUN_FIELD[:-1]:
            run = value.partition(b";")[0].strip()
            return run if RUN_ID.fullmatch(run.decode("latin-1")) else b""
    return b""


def check_run_id(run_id: str) -> None:
    """Raise UsageError where *run_id* cannot name a run."""
    if not RUN_ID.fullmatch(run_id):
        raise UsageError(f"{run_id[:60]!r} is no run id: 1 to 40 of letters, digits, '.', '_', '-'")


def format_run(run_id: str) -> str:
    """Return the `baggage` value that carries *run_id*."""
    return f"{RUN_KEY}={run_id}"


def own_version() -> str:
    """Return the installed version; `source` where stagescope runs from a source tree."""
    try:
        return version("stagescope")
    except PackageNotFoundError:
        return "source"


def boot_id() -> str:
    """Return this boot's id; empty where the system has none (then clocks count as different)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return ""
