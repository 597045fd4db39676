"""One stream's device time, charged to the stages that were open while it passed.

A mark (an event) is put on the stream where a stage opens or closes. What passes on the device
between one mark and the next is charged to the stage opened last among those then open, as in a
timeline (`stagescope.stages.partition`): nested stages are charged the innermost alone, and all
together are charged the union of their times, whichever threads and requests share the stream.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import RLock
from typing import Any

from stagescope.middleware.hooks.torch_device_clock import DeviceClock, DeviceEvent
from stagescope.middleware.timeline import Timeline

MAX_MARKS = 512
"""Marks that the device has not come to; beyond that no further stage is timed."""
MAX_OPEN = 1024
ASKED_AT_ONCE = 8
"""Events asked each time that a mark is put."""

Place = tuple[Timeline, int]
"""A stage's opening: its timeline, and its number there."""


class Open:
    """An opening of a stage on a lane."""

    __slots__ = ("device_ns", "lane", "name", "open", "place", "since_ns")

    def __init__(self, lane: Lane, name: str, place: Place) -> None:
        self.lane = lane
        self.name = name
        self.place = place
        self.open = True
        self.since_ns = 0
        """What the lane had charged to stages in all when the device came to its opening."""
        self.device_ns: int | None = None
        """From its opening to its closing, with all that was inside; None until it is measured."""


class Mark:
    """An event on the stream, and what changes there."""

    __slots__ = ("closes", "event", "opens", "top")

    def __init__(
        self, event: DeviceEvent, top: Open | None, opens: Open | None, closes: Open | None
    ) -> None:
        self.event = event
        self.top = top
        """What is charged from here to the next mark."""
        self.opens = opens
        self.closes = closes


@dataclass(slots=True)
class Sums:
    """What was measured of one stage on one lane."""

    opened: int = 0
    timed: int = 0
    """Openings that are measured to their end."""
    ns: int = 0


@dataclass(slots=True)
class Missed:
    """Openings that are not measured, by reason."""

    full: int = 0
    """The device was too far behind: `MAX_MARKS`, `MAX_OPEN`, or too many streams."""
    capture: int = 0
    """It opened or closed while a graph was captured."""
    unclosed: int = 0
    """Its request ended before it did."""


class Lane:
    """One stream of one device; threads may share it."""

    def __init__(self, clock: DeviceClock, stream: Any, open_stages: dict[Place, Open]) -> None:
        """*open_stages* holds what is open, on any lane."""
        self.device = clock.device(stream)
        self._open_stages = open_stages
        self.missed = Missed()
        self.sums: dict[str, Sums] = {}
        self._clock = clock
        self._stream = stream
        # Reentrant: within it the garbage collector may close a generator that had a stage open.
        self.lock = RLock()
        self._stack: list[Open] = []
        self._ahead: deque[Mark] = deque()
        self._last: Mark | None = None
        """The newest mark that the device has come to."""
        self._spare: list[DeviceEvent] = []
        self._charged_ns = 0

    @property
    def pending(self) -> int:
        """How many marks the device has not come to, as far as it was asked."""
        return len(self._ahead)

    def begin(self, name: str, place: Place) -> None:
        """Put the mark of a stage's opening, if there is room."""
        with self.lock:
            self._drop_ended()
            sums = self.sums.get(name)
            if sums is None:
                sums = self.sums[name] = Sums()
            sums.opened += 1
            if self._clock.capturing():
                self.missed.capture += 1
                return
            if len(self._ahead) >= MAX_MARKS or len(self._stack) >= MAX_OPEN:
                self.missed.full += 1
                return
            opened = Open(self, name, place)
            self._put(opened, opens=opened)
            self._stack.append(opened)
            self._open_stages[place] = opened
            self._ask()

    def end(self, opened: Open) -> None:
        """Put the mark of its closing.

        Under capture there is none: it is not measured, and what is around it is charged the rest.
        """
        with self.lock:
            if not opened.open:
                return  # Its request ended before.
            self._take_out(opened)
            self._drop_ended()
            around = self._stack[-1] if self._stack else None
            if self._clock.capturing():
                self._uncharge(opened, around)
                self.missed.capture += 1
                return
            self._put(around, closes=opened)
            self._ask()

    def settle(self) -> None:
        """Wait until nobody is within: what comes later finds the clock as it is now."""
        with self.lock:
            return

    def _take_out(self, opened: Open) -> None:
        opened.open = False
        if self._stack[-1] is opened:
            self._stack.pop()
        else:
            self._stack.remove(opened)

    def _drop_ended(self) -> None:
        """Let go of stages that nobody closed; their time since the last mark is nobody's."""
        while self._stack and self._stack[-1].place[0].done:
            left = self._stack.pop()
            left.open = False
            self._open_stages.pop(left.place, None)
            self._uncharge(left, None)
            self.missed.unclosed += 1

    def _uncharge(self, opened: Open, instead: Open | None) -> None:
        newest = self._ahead[-1] if self._ahead else self._last
        if newest is not None and newest.top is opened:
            newest.top = instead

    def _put(
        self, top: Open | None, *, opens: Open | None = None, closes: Open | None = None
    ) -> None:
        event = self._spare.pop() if self._spare else self._clock.event()
        event.record(self._stream)
        self._ahead.append(Mark(event, top, opens, closes))

    def _ask(self) -> None:
        ahead = self._ahead
        for _ in range(min(ASKED_AT_ONCE, len(ahead))):
            if not ahead[0].event.query():
                return
            self._pass(ahead.popleft())

    def _pass(self, mark: Mark) -> None:
        """Charge the stretch that ends with *mark*, which the device has come to."""
        last, self._last = self._last, mark
        if last is not None:
            if last.top is not None:
                self._charge(last.top, last.event.elapsed_time(mark.event))
            self._spare.append(last.event)
        if mark.opens is not None:
            mark.opens.since_ns = self._charged_ns
        if mark.closes is not None:
            mark.closes.device_ns = self._charged_ns - mark.closes.since_ns
            self.sums[mark.closes.name].timed += 1

    def _charge(self, opened: Open, elapsed_ms: float) -> None:
        ns = max(0, round(elapsed_ms * 1e6))
        self.sums[opened.name].ns += ns
        self._charged_ns += ns
