"""What the kernel says of a thread: how long it ran, and how long it was ready and had no core."""

from __future__ import annotations

import os
import resource
import threading
import time
from bisect import bisect_right
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline
from stagescope.recorder import format as fmt

_now = time.monotonic_ns

FLOOR_NS = 50_000
"""What is shorter stays with its stage, unrecorded."""

MOST_CHAINED = 16

_THREADPOOL = CODES["queue.threadpool"]


_THREAD = getattr(resource, "RUSAGE_THREAD", resource.RUSAGE_SELF)  # Linux alone has the first.
_used = resource.getrusage

_BYTES = 80
"""Longer than three numbers of 64 bits."""


def _reader(fd: int) -> Callable[[], bytes]:
    """Return what reads *fd* from its start without giving up the interpreter's lock.

    `os.pread` gives it up for a moment: where another thread computes, the lock would have to be
    waited for at each begin and end of what is timed here, 5 ms and more.
    """
    try:
        import ctypes  # Here, for it takes 5 ms, and load runs alone need it

        read = ctypes.PyDLL(None).pread
    except (ImportError, OSError, AttributeError):  # A Python without ctypes.
        return lambda: os.pread(fd, _BYTES, 0)
    read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_long)
    read.restype = ctypes.c_ssize_t
    buffer = ctypes.create_string_buffer(_BYTES)

    def contents() -> bytes:
        if read(fd, buffer, _BYTES - 1, 0) <= 0:
            raise ProcessLookupError
        return buffer.value

    return contents


class ThreadClock:
    """Reads the clocks of the thread that made it."""

    _fd = -1  # Of the class: one that could not be made is deleted like any other.

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        with suppress(OSError):  # No Linux, or a kernel without schedstat: the CPU time alone.
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            self._contents = _reader(self._fd)

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self) -> tuple[int, int, int]:
        """Return CPU time and time in a run queue, ns since the thread began, and how often it slept.

        It slept where it gave up its core by itself: for a lock, in a call that blocks.
        """
        waited_ns = int(self._contents().split()[1]) if self._fd >= 0 else 0
        return time.thread_time_ns(), waited_ns, _used(_THREAD).ru_nvcsw


_local = threading.local()


def thread_clock() -> ThreadClock:
    """Return this thread's clock, made at its first use."""
    clock: ThreadClock | None = getattr(_local, "clock", None)
    if clock is None:
        clock = _local.clock = ThreadClock()
    return clock


def record(
    timeline: Timeline,
    code: int,
    begun_ns: int,
    ended_ns: int,
    before: tuple[int, int, int],
    after: tuple[int, int, int],
) -> None:
    """Record that a thread was at work for *timeline*, and what of that time it had no core.

    *code* is CODE_RAN of a loop, or CODE_THREAD. *before* and *after* are the clock's readings.
    """
    if len(timeline.chain or ()) >= MOST_CHAINED and ended_ns - begun_ns < 1_000_000:
        return  # A stream of thousands of steps: the short ones stay with their stage.
    timeline.mark(code, begun_ns, ended_ns)
    queued_ns = min(after[1] - before[1], ended_ns - begun_ns)
    off_ns = ended_ns - begun_ns - queued_ns - (after[0] - before[0])
    if queued_ns >= FLOOR_NS:
        timeline.mark(fmt.CODE_QUEUED, begun_ns, begun_ns + queued_ns)
    if off_ns >= FLOOR_NS:
        times = bisect_right(fmt.TIMES_ON_CORE, after[2] - before[2]) - 1
        timeline.mark(fmt.CODE_OFF + times, begun_ns, begun_ns + off_ns)


def timed(
    timeline: Timeline, submitted_ns: int, function: Callable[..., Any], *args: Any, **named: Any
) -> Any:
    """Call *function* in a worker thread, and record how it ran while its load run is open.

    *submitted_ns* is when it was given to an executor, from when on it is in `queue.threadpool`; 0
    where that is recorded elsewhere.
    """
    clock, begun_ns, before = None, 0, (0, 0, 0)
    with guarded(timeline.recorder):
        own = thread_clock()
        begun_ns, before = _now(), own.read()
        clock = own
        if submitted_ns and begun_ns - submitted_ns >= FLOOR_NS:
            timeline.mark(_THREADPOOL, submitted_ns, begun_ns)
    try:
        return function(*args, **named)
    finally:
        with guarded(timeline.recorder):
            ended_ns = _now()
            if clock is not None and ended_ns - begun_ns >= FLOOR_NS:
                record(timeline, fmt.CODE_THREAD, begun_ns, ended_ns, before, clock.read())
