"""The `Server-Timing` header of a load run's requests."""

from __future__ import annotations

from pathlib import Path

from stagescope import stage
from stagescope.middleware.server_timing import header_value
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording


def test_a_sub_stage_named_late_counts_for_its_stage(tmp_path: Path) -> None:
    """A name that the app used first long after the start belongs to its stage like any other."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock)
    with recording.request() as timeline:
        header_value(timeline, clock())
        with stage("preprocess.named_late"):
            clock.tick(2_000_000)
        clock.tick(1_000_000)

        value = header_value(timeline, clock())

    assert value == b"preprocess;dur=2.000000, total;dur=3.000000"
    recording.close()
