"""The timelines of several requests, as one: for code that works for all of them at once."""

from __future__ import annotations

from collections.abc import Sequence

from stagescope.middleware.recording.timeline import Timeline


class TimelineGroup(Timeline):
    """Opens and closes a stage in each of *timelines*; its ids are those of the first.

    Each of them is charged the whole time, because each waited for it.
    """

    __slots__ = ("_places", "timelines")

    def __init__(self, timelines: Sequence[Timeline]) -> None:
        one = timelines[0]
        self._begin_without_slot(
            one.recorder, one.clock, one.start_ns, one.trace_id, one.span_id, one.run
        )
        self.watched = one.watched
        self.timelines = tuple(timelines)
        self._places: dict[int, list[int]] = {}

    def open_at(self, code: int, at_ns: int) -> int:
        """Open a stage in each; give the number that closes them."""
        index = next(self.indices)
        self.spill(index, code, at_ns)
        return index

    def spill(self, index: int, code: int, start: int) -> None:
        """Open a stage in each, known as *index*."""
        if not self.done:
            self._places[index] = [timeline.open_at(code, start) for timeline in self.timelines]

    def close_at(self, index: int, at_ns: int, failed: bool = False) -> None:
        """Close the stage *index* in each."""
        for timeline, place in zip(self.timelines, self._places.pop(index, ()), strict=False):
            timeline.close_at(place, at_ns, failed=failed)

    def recode(self, index: int, code: int, *, add: bool = False) -> None:
        """Say of the open stage *index* that it is another one, in each."""
        for timeline, place in zip(self.timelines, self._places.get(index, ()), strict=False):
            timeline.recode(place, code, add=add)

    def innermost(self, waiting: int) -> int:
        """Return that of the first: all of them are in the same stage of the batch."""
        return self.timelines[0].innermost(waiting)

    def inject(self) -> int | None:
        """Lend nothing: a lent slot belongs to one request."""
        return None

    def end(self) -> None:
        """Write no more; each of the timelines is ended by itself."""
        self.done = True
