"""The probe's `stacks`: this process samples its own threads, where nobody outside may.

    {"op": "stacks", "seconds": 5, "hz": 20}

An answer each half second, each whole by itself: `threads` (ident → [system id, name]), `frames`
([function, file, line]), `stacks` (lists of places in `frames`, outermost first), `spans`
([ident, place in `stacks`, start_ns, end_ns, samples]; monotonic), `cpu` ([ns, system id of a
thread → ns of CPU time that it has used so far]). It ends when the asker goes.
A tick takes 0.1 ms of the interpreter, whatever the server does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from stagescope.middleware.probe.server import Connection, Refused
from stagescope.stacks import read_thread_cpu

MAX_HZ = 50.0
MAX_SECONDS = 60.0
MAX_DEPTH = 200
"""Frames of one stack; the innermost ones."""
TELL_NS = 500_000_000
"""Also how long an asker waits at most for the end of what he gives up."""

_SELF = Path("/proc/self")

_sampling = threading.Lock()


def _fresh_lock_in_child() -> None:
    """The thread that held it did not come along with the fork."""
    global _sampling
    _sampling = threading.Lock()


os.register_at_fork(after_in_child=_fresh_lock_in_child)


def answer(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Sample for so many `seconds` at `hz` a second; only one asker at a time."""
    try:
        seconds = min(float(question.get("seconds", 1.0)), MAX_SECONDS)
        period_s = 1 / min(max(float(question.get("hz", 20.0)), 1.0), MAX_HZ)
    except (TypeError, ValueError):
        raise Refused("`seconds` and `hz` are numbers") from None
    mine = _sampling
    if not mine.acquire(blocking=False):
        raise Refused("this process is sampling its stacks for another asker")
    try:
        return _sample(asker, seconds, period_s)
    finally:
        mine.release()


def _sample(asker: Connection, seconds: float, period_s: float) -> Mapping[str, Any]:
    stacks = StackRecorder(int(period_s * 1e9))
    begun_ns = due_ns = told_ns = time.monotonic_ns()
    cpu = [read_thread_cpu(_SELF, begun_ns)]
    end_ns = begun_ns + int(seconds * 1e9)
    while (now_ns := time.monotonic_ns()) < end_ns:
        stacks.add(now_ns)
        if now_ns - told_ns >= TELL_NS:
            cpu.append(read_thread_cpu(_SELF, now_ns))
            asker.send(stacks.answer() | {"cpu": cpu})
            cpu.clear()
            stacks, told_ns = StackRecorder(stacks.period_ns), now_ns
        due_ns = max(due_ns + stacks.period_ns, now_ns)  # What came late is not made up for.
        if asker.closed(max(0.0, (due_ns - time.monotonic_ns()) / 1e9)):
            break
    cpu.append(read_thread_cpu(_SELF, time.monotonic_ns()))
    return stacks.answer() | {"cpu": cpu}


class StackRecorder:
    """Stacks seen, each written down once."""

    def __init__(self, period_ns: int) -> None:
        self.period_ns = period_ns
        self._frames: dict[tuple[str, str, int], int] = {}
        self._stacks: dict[tuple[int, ...], int] = {}
        self._spans: list[list[int]] = []
        self._open: dict[int, list[int]] = {}
        """By thread: its newest span, which grows while its stack stays the same."""

    def add(self, now_ns: int) -> None:
        """Look at every thread but this one."""
        own = threading.get_ident()
        for ident, frame in sys._current_frames().items():  # pyright: ignore[reportPrivateUsage]
            if ident != own:
                self._see(ident, self._stack(frame), now_ns)

    def _see(self, ident: int, stack: int, now_ns: int) -> None:
        span = self._open.get(ident)
        if span is not None and span[1] == stack and now_ns - span[3] < self.period_ns:
            span[3] = now_ns + self.period_ns
            span[4] += 1
            return
        if span is not None:
            span[3] = min(span[3], now_ns)
        span = [ident, stack, now_ns, now_ns + self.period_ns, 1]
        self._open[ident] = span
        self._spans.append(span)

    def _stack(self, frame: FrameType | None) -> int:
        places: list[int] = []
        while frame is not None and len(places) < MAX_DEPTH:
            code = frame.f_code
            seen = (code.co_qualname, code.co_filename, frame.f_lineno or 0)
            places.append(self._frames.setdefault(seen, len(self._frames)))
            frame = frame.f_back
        return self._stacks.setdefault(tuple(reversed(places)), len(self._stacks))

    def answer(self) -> dict[str, Any]:
        """Return it as one answer."""
        threads = {t.ident: [t.native_id or 0, t.name] for t in threading.enumerate()}
        return {
            "threads": {str(ident): about for ident, about in threads.items() if ident},
            "frames": list(self._frames),
            "stacks": list(self._stacks),
            "spans": self._spans,
        }
