"""A finished timeline whose record waits for what only somebody else knows: when it began.

For servers that tell a request's arrival only after its response was sent. While it waits it
stands in its in-flight slot as finished, so a killed process still leaves it, without that part.
"""

from __future__ import annotations

from typing import NamedTuple, cast

from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.slots import ENDS, Slot
from stagescope.middleware.recording.timeline import Timeline
from stagescope.recorder import format as fmt

_START_WORD = (fmt.OPENED_AT + 8) // 8
_DURATION_WORD = fmt.FINISHED_AT // 8


class Late(NamedTuple):
    """A stage that became known late, for an entry that was reserved with `reserve`."""

    entry: int
    code: int
    start_ns: int
    end_ns: int


def reserve(timeline: Timeline) -> int:
    """Keep an entry for a stage that is written later, or never."""
    return next(timeline.indices)


def move_start(timeline: Timeline, start_ns: int) -> None:
    """Begin *timeline*, still open, earlier than when it was made."""
    timeline.start_ns = start_ns
    timeline.slot.words[_START_WORD] = start_ns


class _Slots(list[Slot]):
    """Stands for the recorder while a timeline ends: keeps what would be committed."""

    def commit(self, slot: Slot) -> None:
        self.append(slot)


class DeferredRecord:
    """A timeline that ended and is not committed; made by `hold`."""

    __slots__ = ("_recorder", "_slots", "start_ns")

    def __init__(self, recorder: Recorder, slots: list[Slot], start_ns: int) -> None:
        self._recorder = recorder
        self._slots = slots
        self.start_ns = start_ns

    def release(self, start_ns: int, late: tuple[Late, ...] = ()) -> None:
        """Begin at *start_ns*, which is not after the start so far, add *late*, and commit.

        Late entries lie in the timeline's first slot.
        """
        head = self._slots[-1]
        for entry, code, opened_ns, closed_ns in late:
            head.times[entry] = opened_ns
            head.times[entry + ENDS] = closed_ns
            head.codes[entry] = code
        head.words[_DURATION_WORD] += self.start_ns - start_ns
        head.words[_START_WORD] = start_ns
        for slot in self._slots:
            self._recorder.commit(slot)


def hold(
    timeline: Timeline,
    end_ns: int,
    *,
    request_bytes: int = 0,
    response_bytes: int = 0,
    chunks: int = 0,
    status: int = 0,
    error: bytes = b"",
    route: bytes = b"",
) -> DeferredRecord:
    """End *timeline* as `Timeline.finish` does, all but the commit."""
    recorder, slots = timeline.recorder, _Slots()
    timeline.recorder = cast(Recorder, slots)
    try:
        timeline.finish(
            end_ns, request_bytes, response_bytes, 0, 0, chunks, status, error, route
        )  # fmt: skip
    finally:
        timeline.recorder = recorder
    return DeferredRecord(recorder, slots, timeline.start_ns)
