"""Several timelines as one: what happens once is in each of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagescope import carry, stage
from stagescope.middleware.recording.timeline import current
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording


def test_stages_go_to_all(tmp_path: Path) -> None:
    """A stage, nested and failed ones too, is charged to each for its whole time."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock)
    with recording.request() as first, recording.request() as second:
        token = current.set(TimelineGroup([first, second]))
        with stage("preprocess"):
            clock.tick(10)
            with pytest.raises(KeyError), stage("preprocess.parse"):
                clock.tick(5)
                raise KeyError
        carried = carry(lambda: clock.tick(3))
        clock.tick(2)
        carried()
        current.reset(token)
    for record in recording.requests:
        assert record.self_ns() == {
            "preprocess": 10, "preprocess.parse": 5, "queue.threadpool": 2, "other": 3,
        }  # fmt: skip
        assert [span.stage for span in record.stages if span.failed] == ["preprocess.parse"]
    assert len(recording.requests) == 2
    recording.close()


def test_more_stages_than_a_slot_holds(tmp_path: Path) -> None:
    """A hundred openings are a hundred in each."""
    clock = HandClock()
    recording = Recording(tmp_path, clock=clock)
    with recording.request() as first, recording.request() as second:
        together = TimelineGroup([first, second])
        token = current.set(together)
        for _ in range(100):
            with stage("inference"):
                clock.tick(1)
        current.reset(token)
        together.end()
        with stage("inference"):
            clock.tick(1)
    for record in recording.requests:
        assert len([span for span in record.stages if span.self_ns == 1]) >= 100
    recording.close()
