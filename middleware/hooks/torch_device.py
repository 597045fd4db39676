"""Device time of stages: an observer that puts events on the stream where stages open and close.

It comes when the agent asks for device times in a process that uses its device by then, so a
server without a device, or without an agent, pays nothing. What it measured is kept as sums by
stage and device, which the agent asks for once a second (`torch_readings`).
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from threading import Lock
from typing import Any

from stagescope.middleware.guard import say_once
from stagescope.middleware.hooks.torch_device_clock import DeviceClock, TorchClock
from stagescope.middleware.hooks.torch_device_lane import Lane, Open, Place
from stagescope.middleware.names import CODES
from stagescope.middleware.observers import leave, observe
from stagescope.middleware.timeline import Timeline

STAGES_VARIABLE = "STAGESCOPE_DEVICE_STAGES"
"""Stages whose device time is taken, each with its sub-stages, commas between; `off`: none."""
DEFAULT_STAGES = "inference"
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
        self._open: dict[Place, Open] = {}
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

    def _begin(self, name: str, place: Place) -> None:
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
        """Give all that was measured since it came; from any thread, and it asks no device."""
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
    """Give what takes this process's device time, begun where it is not; None where it is off."""
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
    """Give the stages whose device time is to be taken."""
    text = os.environ.get(STAGES_VARIABLE, DEFAULT_STAGES)
    names = [name.strip() for name in text.split(",") if name.strip()]
    return [] if names == ["off"] else names


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
