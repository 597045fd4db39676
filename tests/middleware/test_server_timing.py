"""The `Server-Timing` header: what a client without an agent learns."""

from __future__ import annotations

from pathlib import Path

from stagescope import stage
from stagescope.middleware.carrier import attached, lend
from stagescope.middleware.server_timing import header_value
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording


def test_what_a_worker_wrote_is_in_it(tmp_path: Path) -> None:
    """A stage in the lent part of a timeline counts like one of the request's own process."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock)
    with recording.request() as timeline:
        with stage("preprocess"):
            clock.tick(2_000_000)
        with attached(lend(), recording.recorder, clock), stage("inference"):
            clock.tick(5_000_000)
        clock.tick(1_000_000)
        told = header_value(timeline, clock())
    assert told == b"preprocess;dur=2.000000, inference;dur=5.000000, total;dur=8.000000"
    recording.close()
