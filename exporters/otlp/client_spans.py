"""The load driver's own spans: what the client of each request saw, around the server's trace.

A CLIENT span from the moment at which the request should have been sent to its last byte, and below
it the parts of that time. The span that `traceparent` named is the one that holds the server's:
`first byte wait`, or, where the response went on after its first bytes, the CLIENT span itself, so
that the server's span lies in its parent and on the trace's critical path (stage_spans.py).
"""

from __future__ import annotations

import socket
import time
from collections.abc import Iterator, Mapping
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry.sdk.resources import OTELResourceDetector
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanKind
from opentelemetry.trace.status import Status, StatusCode

from stagescope import semconv as names
from stagescope.exporters.otlp.resource import KeptResource
from stagescope.exporters.otlp.stage_spans import US, Value, context_of, sampled_at, whole_us
from stagescope.identity import stage_span_id
from stagescope.records import Anchor
from stagescope.runfolder.run import Run

LOAD_SERVICE: Final = "stagescope-load"
WHOLE_AT_ONCE_NS: Final = 1_000_000
"""A response whose bytes all came so soon after its first is one that did not go on."""
FIRST_BYTE_WAIT: Final = "first byte wait"
PARTS: Final = (
    ("client wait", "intended_ns", "started_ns"),
    ("connect", "started_ns", "connected_ns"),
    ("send", "connected_ns", "sent_ns"),
    (FIRST_BYTE_WAIT, "sent_ns", "first_byte_ns"),
    ("receive", "first_byte_ns", "last_byte_ns"),
)
"""Name, and the stamps at which it begins and ends."""
ANCHORS_NS: Final = 20_000
"""So far two processes of a host may differ in what they take for the same wall-clock time."""


def anchor_now() -> Anchor:
    """Return one moment on both clocks, read as closely together as some tries give."""
    tries = [(time.monotonic_ns(), time.time_ns(), time.monotonic_ns()) for _ in range(9)]
    before, wall, after = min(tries, key=lambda read: read[2] - read[0])
    return Anchor((before + after) // 2, wall)


class ClientSpanBuilder:
    """Builds the spans of a request from its row of the `client` table."""

    def __init__(self, run: Run, anchor: Anchor | None = None) -> None:
        self._anchor = anchor or anchor_now()
        version = run.versions.get("stagescope", "")
        told = {str(k): str(v) for k, v in OTELResourceDetector().detect().attributes.items()}
        self._resource = KeptResource(
            told
            | {
                names.SERVICE_NAME: LOAD_SERVICE,
                names.SERVICE_INSTANCE_ID: run.run_id,
                names.HOST_NAME: told.get(names.HOST_NAME, socket.gethostname()),
                names.TELEMETRY_SDK_NAME: "stagescope",
                names.TELEMETRY_SDK_LANGUAGE: "python",
                names.TELEMETRY_SDK_VERSION: version,
            }
        )
        self._scope = InstrumentationScope("stagescope", version)
        plan = run.plan
        parts = urlsplit(plan.url)
        self._name = f"{names.known_method(plan.method)} {parts.path or '/'}"
        self._common: dict[str, Value] = {
            names.HTTP_REQUEST_METHOD: names.known_method(plan.method),
            names.URL_FULL: plan.url,
            names.SERVER_ADDRESS: parts.hostname or "",
            names.SERVER_PORT: parts.port or (443 if parts.scheme == "https" else 80),
            names.LOAD_RUN_ID: run.run_id,
            names.LOAD_RUN_RATE: plan.rate_per_s or 0.0,
        }

    def spans(self, row: Mapping[str, Any], server_end_ns: int | None) -> list[ReadableSpan]:
        """Return the CLIENT span, then its parts.

        *server_end_ns* is when the server was done, on the client's monotonic clock; None where that
        is not known.
        """
        stamps = dict(row)
        end_ns, first_ns = row["last_byte_ns"], row["first_byte_ns"]
        if first_ns is None:
            stamps["first_byte_ns"] = first_ns = end_ns
        at_once = end_ns - first_ns <= WHOLE_AT_ONCE_NS
        # A server is done a moment after the client has its last byte. Jaeger warns of a child that
        # ends after its parent, so the spans around the server's last until it is done; how long the
        # client waited stands in their attributes.
        done_ns = first_ns if server_end_ns is None else max(first_ns, server_end_ns + ANCHORS_NS)
        inside = at_once or (server_end_ns is not None and done_ns - first_ns <= WHOLE_AT_ONCE_NS)
        if inside:
            stamps["first_byte_ns"] = done_ns
        parts = [
            (name, stamps[since], stamps[until])
            for name, since, until in PARTS
            if stamps[until] > stamps[since]
        ]
        inside = inside and any(name == FIRST_BYTE_WAIT for name, _, _ in parts)
        named, other = int(row["span_id"], 16), stage_span_id(int(row["span_id"], 16), 0)
        root = self._span(
            self._name, row, other if inside else named, None, SpanKind.CLIENT,
            self._common | dict(_attributes(row)), (row["intended_ns"], max(end_ns, done_ns)), _status(row),
        )  # fmt: skip
        return [root, *self._parts(row, root, parts, named if inside else 0)]

    def _parts(
        self,
        row: Mapping[str, Any],
        root: ReadableSpan,
        parts: list[tuple[str, int, int]],
        named: int,
    ) -> Iterator[ReadableSpan]:
        owner = int(row["span_id"], 16)
        for index, (name, since_ns, until_ns) in enumerate(parts):
            follows = index + 1 < len(parts)
            span_id = (
                named if named and name == FIRST_BYTE_WAIT else stage_span_id(owner, index + 1)
            )
            yield self._span(
                name, row, span_id, root, SpanKind.INTERNAL,
                {names.DURATION_NS: until_ns - since_ns}, (since_ns, until_ns),
                Status(StatusCode.ERROR) if row["error"] and not follows else _UNSET,
                early_ns=US if follows else 0,
            )  # fmt: skip

    def _span(
        self,
        name: str,
        row: Mapping[str, Any],
        span_id: int,
        parent: ReadableSpan | None,
        kind: SpanKind,
        attributes: Mapping[str, Any],
        times_ns: tuple[int, int],
        status: Status,
        *,
        early_ns: int = 0,
    ) -> ReadableSpan:
        start, end = (whole_us(self._anchor.wall(moment)) for moment in times_ns)
        return ReadableSpan(
            name, context_of(row["trace_id"], span_id, state=sampled_at(0)), parent.context if parent else None,
            self._resource, attributes, (), (), kind, status=status,
            start_time=start, end_time=max(start, end - early_ns),
            instrumentation_scope=self._scope,
        )  # fmt: skip


_UNSET: Final = Status(StatusCode.UNSET)


def _status(row: Mapping[str, Any]) -> Status:
    return Status(StatusCode.ERROR) if row["error"] or row["status"] >= 400 else _UNSET


def _attributes(row: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    yield names.DURATION_NS, row["last_byte_ns"] - row["intended_ns"]
    yield names.LOAD_PHASE, row["phase"]
    yield names.HTTP_REQUEST_BODY_SIZE, row["request_bytes"]
    if row["status"]:
        yield names.HTTP_RESPONSE_STATUS_CODE, row["status"]
        yield names.HTTP_RESPONSE_BODY_SIZE, row["response_bytes"]
        yield names.CHUNKS, row["chunks"]
    if row["first_byte_ns"] is not None:
        yield names.CLIENT_FIRST_BYTE_NS, row["first_byte_ns"] - row["intended_ns"]
    if error := row["error"] or (str(row["status"]) if row["status"] >= 400 else ""):
        yield names.ERROR_TYPE, error
