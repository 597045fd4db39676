"""Device time of stages: an observer that puts events on the stream where stages open and close.

It comes when the agent asks for device times in a process that uses its device by then, so a
server without a device, or without an agent, pays nothing. What it measured is kept as sums by
stage and device, which the agent asks for once a second (`torch_readings`).
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from threading import Lock, RLock
from typing import Any

from stagescope import settings
from stagescope.middleware.recording.guard import say_once
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.runtime.observers import leave, observe
from stagescope.middleware.torch.device_events import DeviceClock, DeviceEvent, TorchClock

# One stream's device time, charged to the stages that were open while it passed.
#
# A mark (an event) is put on the stream where a stage opens or closes. What passes on the device
# between one mark and the next is charged to the stage opened last among those then open, as in a
# timeline (`stagescope.stages.partition`): nested stages are charged the innermost alone, and all
# together are charged the union of their times, whichever threads and requests share the stream.


MAX_MARKS = 512
"""Marks that the device has not come to; beyond that no further stage is timed."""
MAX_OPEN = 1024
ASKED_AT_ONCE = 8
"""Events asked each time that a mark is put."""

AgentLocation = tuple[Timeline, int]
"""A stage's opening: its timeline, and its number there."""


class Open:
    """An opening of a stage on a lane."""

    __slots__ = ("device_ns", "lane", "name", "open", "place", "since_ns")

    def __init__(self, lane: Lane, name: str, place: AgentLocation) -> None:
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

    def __init__(
        self, clock: DeviceClock, stream: Any, open_stages: dict[AgentLocation, Open]
    ) -> None:
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

    def begin(self, name: str, place: AgentLocation) -> None:
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


MAX_LANES = 256
"""Streams; a server that makes a new one for each request has only the first of them timed."""


class DeviceTime:
    """Takes the device time of *stages* and their sub-stages (a `StageObserver`)."""

    def __init__(self, clock: DeviceClock, stages: Sequence[str]) -> None:
        self.failure = ""
        """Why it has stopped: what the device said."""
        self._clock = clock
        self._wanted = _Wanted(stages)
        self._lanes: dict[Hashable, Lane] = {}
        self._open: dict[AgentLocation, Open] = {}
        self._untold: dict[str, int] = {}
        """Openings that have no lane, by stage."""
        self._lock = Lock()
        clock.on_capture(self._quiet)

    def opened(self, timeline: Timeline, index: int, code: int) -> None:
        """Begin to time it, if it is wanted and a mark can be put."""
        name = self._wanted[code]
        if name and not timeline.done:
            try:
                self._begin(name, (timeline, index))
            except RuntimeError as error:
                self._stand_back(error)

    def closed(self, timeline: Timeline, index: int, code: int) -> int | None:
        """End it; what it took is known at once only where the device is as far."""
        opened = self._open.pop((timeline, index), None)
        if opened is None:
            return None
        try:
            opened.lane.end(opened)
        except RuntimeError as error:
            self._stand_back(error)
        return opened.device_ns

    def _begin(self, name: str, place: AgentLocation) -> None:
        clock = self._clock
        stream = clock.stream()
        lane = self._lanes.get(clock.key(stream)) or self._new_lane(stream)
        if lane is None:
            self._pass_over(name)
        else:
            lane.begin(name, place)

    def _new_lane(self, stream: Any) -> Lane | None:
        with self._lock:
            key = self._clock.key(stream)
            if key not in self._lanes and len(self._lanes) < MAX_LANES:
                self._lanes[key] = Lane(self._clock, stream, self._open)
            return self._lanes.get(key)

    def _pass_over(self, name: str) -> None:
        with self._lock:
            self._untold[name] = self._untold.get(name, 0) + 1

    def _quiet(self) -> None:
        for lane in list(self._lanes.values()):
            lane.settle()

    def _stand_back(self, error: RuntimeError) -> None:
        """Leave for good: a device that failed once fails at each call, and the server sees it."""
        leave(self)
        self._open.clear()
        self.failure = str(error).partition("\n")[0]
        say_once(f"device time is taken no more in this process: {self.failure}")

    def sums(self) -> Mapping[str, Any]:
        """Return all that was measured since it came; from any thread, and it asks no device."""
        lanes = list(self._lanes.values())
        missed = [lane.missed for lane in lanes]
        return {
            "stages": _by_stage(lanes),
            "untold": dict(self._untold),
            "missed": {
                "full": sum(one.full for one in missed) + sum(self._untold.values()),
                "capture": sum(one.capture for one in missed),
                "unclosed": sum(one.unclosed for one in missed),
            },
            "pending": sum(lane.pending for lane in lanes),
            "failure": self.failure,
        }


def _by_stage(lanes: Sequence[Lane]) -> list[dict[str, Any]]:
    sums: dict[tuple[str, str], list[int]] = {}
    for lane in lanes:
        with lane.lock:
            for name, of_stage in lane.sums.items():
                total = sums.setdefault((name, lane.device), [0, 0, 0])
                total[0] += of_stage.opened
                total[1] += of_stage.timed
                total[2] += of_stage.ns
    return [
        {"stage": stage, "device": device, "opened": opened, "timed": timed, "ns": ns}
        for (stage, device), (opened, timed, ns) in sums.items()
    ]


class _Wanted(dict[int, str]):
    """The name of a stage by its code; empty for one that is not timed."""

    def __init__(self, stages: Sequence[str]) -> None:
        self._stages = frozenset(stages)

    def __missing__(self, code: int) -> str:
        name = next((name for name, known in list(CODES.items()) if known == code), "")
        parts = name.split(".")
        prefixes = {".".join(parts[:length]) for length in range(1, len(parts) + 1)}
        wanted = self[code] = name if prefixes & self._stages else ""
        return wanted


_present: DeviceTime | None = None
_lock = Lock()


def device_time(kind: str, namespace: Any) -> DeviceTime | None:
    """Return what takes this process's device time, begun where it is not; None where it is off."""
    global _present
    stages = asked_stages()
    if not stages:
        return None
    with _lock:
        if _present is None:
            _present = DeviceTime(TorchClock(kind, namespace), stages)
            observe(_present)
        return _present


def asked_stages() -> list[str]:
    """Return the stages whose device time is to be taken."""
    names = settings.DEVICE_STAGES.names()
    return [] if names == ("off",) else list(names)


def end() -> None:
    """Take no more device time in this process."""
    global _present
    present, _present = _present, None
    if present is not None:
        leave(present)


_inherited: list[DeviceTime] = []


def _forget_in_child() -> None:
    """A device cannot be used after a fork; the parent's events are kept, so nobody frees them."""
    global _lock, _present
    _lock = Lock()
    if _present is not None:
        _inherited.append(_present)
        leave(_present)
        _present = None


os.register_at_fork(after_in_child=_forget_in_child)
