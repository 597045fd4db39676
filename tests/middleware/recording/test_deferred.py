"""A timeline that is ended first and told its beginning later."""

from __future__ import annotations

from pathlib import Path

from stagescope.middleware.recording.deferred import Late, hold, move_start, reserve
from stagescope.middleware.recording.names import CODES
from stagescope.records import State
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording

QUEUE, INFERENCE = CODES["queue.batch"], CODES["inference"]


def test_released_with_an_earlier_start(tmp_path: Path) -> None:
    """The record begins when it is told to, with the late stage; chained slots come along."""
    clock = HandClock(1_000_000)
    recording = Recording(tmp_path, clock=clock)
    with recording.request() as timeline:
        move_start(timeline, 999_900)
        waiting = reserve(timeline)
        for _ in range(40):
            index = timeline.open(INFERENCE)
            clock.tick(10)
            timeline.close(index)
        held = hold(timeline, clock(), status=200)
        assert recording.read() == []
        held.release(999_000, (Late(waiting, QUEUE, 999_000, 999_900),))
    (record,) = recording.requests
    assert (record.start_ns, record.duration_ns, record.status) == (999_000, 1400, 200)
    assert record.self_ns() == {"queue.batch": 900, "inference": 400, "other": 100}
    recording.close()


def test_killed_while_held(tmp_path: Path) -> None:
    """What stands in flight while it is held is a finished record, all but the late part."""
    clock = HandClock(1_000_000)
    recording = Recording(tmp_path, clock=clock)
    with recording.request() as timeline:
        reserve(timeline)
        index = timeline.open(INFERENCE)
        clock.tick(10)
        timeline.close(index)
        hold(timeline, clock(), status=200)
    (record,) = recording.reader.in_flight(clock())
    assert (record.state, record.duration_ns) == (State.FINISHED, 10)
    assert [span.stage for span in record.stages] == ["inference"]
    recording.close()
