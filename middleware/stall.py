"""A stall: a moment in which a whole process stood still, as a record of its own in the ring.

Its reader lays it over the requests of the same process, see `stagescope.stalls`.
"""

from __future__ import annotations

from stagescope import recorder_format as fmt
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.timeline import Timeline

LOOP_FLOOR_NS = 10_000_000
"""Lateness of the event loop from which it is a stall."""
GC_FLOOR_NS = 1_000_000
"""Length of a collection from which it is a stall."""


def write_stall(recorder: Recorder, cause: bytes, start_ns: int, end_ns: int) -> None:
    """Write one; takes no lock, for the collector may run in the midst of anything."""
    bits = recorder.random_bits
    span_id = bits(64).to_bytes(8, "big")
    stall = Timeline(
        recorder, fmt.KIND_STALL, start_ns, b"", span_id, method=cause, flags=0
    )  # fmt: skip
    stall.finish(end_ns, 0, 0, 0, 0, 0, 0, b"", b"")
