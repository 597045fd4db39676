"""Waits that belong to a process and not to one request: a late event loop, a full thread pool, GC.

They are figures in the recorder file's header (`WAITS` of recorder/format.py), read by the agent.
Each event loop has one timer, ten times a second; its own cost is a figure too.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from contextlib import suppress
from typing import Any, Protocol
from weakref import WeakKeyDictionary, WeakSet

from stagescope import settings
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.timeline import Timeline
from stagescope.recorder import format as fmt

# How long a thread waits for the interpreter's lock: an estimate, made only where asked for.
#
# A thread sleeps for a millisecond, ten times a second; by how much longer it took than the least
# that it ever took here (which is the timer's own lateness) is taken as the wait for the lock. On a
# machine whose cores are all busy the wait for a core is in it as well. Each reading makes the
# thread that holds the lock give it up once.


GIL_PERIOD_S = 0.1
NAP_S = 0.001

_gil_watched: WeakSet[Any] = WeakSet()


class Figures(Protocol):
    """A recorder, as far as these figures go."""

    @property
    def closed(self) -> bool:
        """True once nothing more is to be written."""
        ...

    def count(self, counter: str) -> None:
        """Add one to a counter."""

    def add_wait(self, name: str, value: int) -> None:
        """Add *value* to a figure."""

    def raise_wait(self, name: str, value: int) -> None:
        """Make a figure *value* if it is less."""


def watch_gil(recorder: Figures) -> None:
    """Start the thread where `STAGESCOPE_GIL` asks for it, once a recorder."""
    if not settings.GIL.on() or recorder in _gil_watched:
        return
    _gil_watched.add(recorder)
    watch = GilWatch(recorder)
    threading.Thread(target=watch.run, name="stagescope-gil", daemon=True).start()


class GilWatch:
    """Takes the readings."""

    def __init__(self, recorder: Figures) -> None:
        self._recorder = recorder
        self._least_ns = 1 << 62

    def run(self) -> None:
        """Take readings until the recorder is closed."""
        while not self._recorder.closed:
            time.sleep(GIL_PERIOD_S)
            with guarded(self._recorder):
                self.read()

    def read(self) -> None:
        """Take one reading."""
        used_ns = time.thread_time_ns()
        before_ns = time.perf_counter_ns()
        time.sleep(NAP_S)
        took_ns = time.perf_counter_ns() - before_ns
        self._least_ns = min(self._least_ns, took_ns)
        waited_ns = took_ns - self._least_ns
        recorder = self._recorder
        recorder.add_wait("gil_ticks", 1)
        recorder.add_wait("gil_wait_ns", waited_ns)
        recorder.raise_wait("gil_wait_max_ns", waited_ns)
        recorder.add_wait("gil_cost_ns", time.thread_time_ns() - used_ns)


# A stall: a moment in which a whole process stood still, as a record of its own in the ring.
#
# Its reader lays it over the requests of the same process, see `stagescope.stalls`.


LOOP_FLOOR_NS = 10_000_000
"""Lateness of the event loop from which it is a stall."""
GC_FLOOR_NS = 1_000_000
"""Length of a collection from which it is a stall."""


def write_stall(recorder: Recorder, cause: bytes, start_ns: int, end_ns: int) -> None:
    """Write one; takes no lock, for the collector may run in the midst of anything."""
    bits = recorder.random_bits
    span_id = bits(64).to_bytes(8, "big")
    stall = Timeline(
        recorder, fmt.KIND_STALL, start_ns, b"", span_id, method=cause, flags=0
    )  # fmt: skip
    try:
        stall.finish(end_ns, 0, 0, 0, 0, 0, 0, b"", b"")
    finally:
        if not stall.done:
            stall.discard()


PERIOD_S = 0.1

pool: Any = None
"""anyio's limiter of worker threads, once its hook has seen one; its figures are read by the timer."""

_watched: WeakKeyDictionary[asyncio.AbstractEventLoop, Recorder] = WeakKeyDictionary()
"""Event loops, and to which recorder their timers write."""
_collecting: WeakSet[Recorder] = WeakSet()


def watch(recorder: Recorder) -> None:
    """Watch the running event loop, where there is one, and the garbage collector."""
    watch_gil(recorder)
    if recorder not in _collecting:
        _collecting.add(recorder)
        gc.callbacks.append(Collections(recorder).tell)
    with suppress(RuntimeError):  # No asyncio loop: trio, or a server that has none.
        loop = asyncio.get_running_loop()
        if loop not in _watched or _watched[loop].closed:
            _watched[loop] = recorder
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
        with guarded(self._recorder):
            if self._recorder.closed:
                return
            self._record(late_ns)
        with guarded(self._recorder):
            self.start()

    def _record(self, late_ns: int) -> None:
        begun_ns = time.perf_counter_ns()
        recorder = self._recorder
        recorder.add_wait("loop_ticks", 1)
        recorder.add_wait("loop_lag_ns", late_ns)
        recorder.raise_wait("loop_lag_max_ns", late_ns)
        if late_ns >= LOOP_FLOOR_NS:
            now_ns = recorder.clock()
            write_stall(recorder, b"loop", now_ns - late_ns, now_ns)
        self._record_pool(int(PERIOD_S * 1e9) + late_ns)
        recorder.add_wait("watch_cost_ns", time.perf_counter_ns() - begun_ns)

    def _record_pool(self, since_ns: int) -> None:
        """Record the pool's size and use; *since_ns* is the time since the last reading."""
        if pool is not None:
            waiting = pool.statistics().tasks_waiting
            self._recorder.set_wait("pool_threads", int(min(pool.total_tokens, 2**63)))
            self._recorder.set_wait("pool_busy", pool.borrowed_tokens)
            self._recorder.add_wait("pool_busy_ns", pool.borrowed_tokens * since_ns)
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
        if self._recorder.closed:
            with suppress(ValueError):
                gc.callbacks.remove(self.tell)
            return
        with guarded(self._recorder):
            self._record(pause_ns)

    def _record(self, pause_ns: int) -> None:
        self._recorder.add_wait("gc_pauses", 1)
        self._recorder.add_wait("gc_pause_ns", pause_ns)
        self._recorder.raise_wait("gc_pause_max_ns", pause_ns)
        if pause_ns >= GC_FLOOR_NS:
            now_ns = self._recorder.clock()
            write_stall(self._recorder, b"gc", now_ns - pause_ns, now_ns)
