"""Waits that belong to a process and not to one request: a late event loop, a full thread pool, GC.

They are figures in the recorder file's header (`WAITS` of recorder_format), read by the agent.
Each event loop has one timer, ten times a second; its own cost is a figure too.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import suppress
from typing import Any
from weakref import WeakSet

from stagescope.middleware.gil_watch import watch_gil
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.stall import GC_FLOOR_NS, LOOP_FLOOR_NS, write_stall

PERIOD_S = 0.1

pool: Any = None
"""anyio's limiter of worker threads, once its hook has seen one; its figures are read by the timer."""

_watched: WeakSet[asyncio.AbstractEventLoop] = WeakSet()
_collecting: WeakSet[Recorder] = WeakSet()


def watch(recorder: Recorder) -> None:
    """Watch the running event loop, where there is one, and the garbage collector."""
    watch_gil(recorder)
    if recorder not in _collecting:
        _collecting.add(recorder)
        gc.callbacks.append(Collections(recorder).tell)
    with suppress(RuntimeError):  # No asyncio loop: trio, or a server that has none.
        loop = asyncio.get_running_loop()
        if loop not in _watched:
            _watched.add(loop)
            LoopTimer(recorder, loop).start()


class LoopTimer:
    """Asks the loop to be called every 0.1 s; by how much it comes late is the loop's lag.

    A timer and not a task: nothing has to be cancelled when the loop ends.
    """

    def __init__(self, recorder: Recorder, loop: asyncio.AbstractEventLoop) -> None:
        self._recorder = recorder
        self._loop = loop
        self._due_s = 0.0

    def start(self) -> None:
        """Set the timer."""
        self._due_s = self._loop.time() + PERIOD_S
        self._loop.call_at(self._due_s, self._tick)

    def _tick(self) -> None:
        late_ns = max(0, int((self._loop.time() - self._due_s) * 1e9))
        begun_ns = time.perf_counter_ns()
        recorder = self._recorder
        try:
            if recorder.closed:
                return
            recorder.add_wait("loop_ticks", 1)
            recorder.add_wait("loop_lag_ns", late_ns)
            recorder.raise_wait("loop_lag_max_ns", late_ns)
            if late_ns >= LOOP_FLOOR_NS:
                now_ns = recorder.clock()
                write_stall(recorder, b"loop", now_ns - late_ns, now_ns)
            self._tell_pool()
            recorder.add_wait("watch_cost_ns", time.perf_counter_ns() - begun_ns)
        except ValueError:
            return  # The file is a forked parent's, see Recorder.abandon.
        self.start()

    def _tell_pool(self) -> None:
        if pool is not None:
            waiting = pool.statistics().tasks_waiting
            self._recorder.set_wait("pool_threads", int(min(pool.total_tokens, 2**63)))
            self._recorder.set_wait("pool_busy", pool.borrowed_tokens)
            self._recorder.set_wait("pool_waiting", waiting)
            self._recorder.raise_wait("pool_waiting_max", waiting)


class Collections:
    """Times each run of the cyclic garbage collector, which stops every thread of the process."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._since_ns = 0

    def tell(self, phase: str, info: dict[str, int]) -> None:
        """Be told by the collector that it starts or stops (`gc.callbacks`)."""
        if phase == "start":
            self._since_ns = time.perf_counter_ns()
            return
        if not self._since_ns:
            return  # We came while it ran.
        pause_ns = time.perf_counter_ns() - self._since_ns
        try:
            if self._recorder.closed:
                raise ValueError
            self._recorder.add_wait("gc_pauses", 1)
            self._recorder.add_wait("gc_pause_ns", pause_ns)
            self._recorder.raise_wait("gc_pause_max_ns", pause_ns)
            if pause_ns >= GC_FLOOR_NS:
                now_ns = self._recorder.clock()
                write_stall(self._recorder, b"gc", now_ns - pause_ns, now_ns)
        except ValueError:
            with suppress(ValueError):
                gc.callbacks.remove(self.tell)
