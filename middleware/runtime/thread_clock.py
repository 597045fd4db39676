"""What the kernel says of a thread: how long it ran, and how long it was ready and had no core."""

from __future__ import annotations

import os
import resource
import sys
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

Reading = tuple[int, int, int]
"""CPU time and time in a run queue, ns since the thread began, and how often it slept: it slept
where it gave up its core by itself, for a lock or in a call that blocks."""

UNREAD_NS = 200_000
"""The run queue is looked at again once a thread has been off its core for longer than this."""


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
    read.restype = ctypes.c_ssize_t
    buffer = ctypes.create_string_buffer(_BYTES)
    # Made once: to convert them at each call takes as long as the call.
    file, into = ctypes.c_int(fd), ctypes.byref(buffer)
    most, place = ctypes.c_size_t(_BYTES - 1), ctypes.c_long(0)

    def contents() -> bytes:
        if read(file, into, most, place) <= 0:
            raise ProcessLookupError
        return buffer.value

    return contents


class ThreadClock:
    """Reads the clocks of the thread that made it.

    A thread that was on its core all the time waited for none: so its CPU time is what is read
    each time, and its run queue, which costs more, only where it was off for longer than
    UNREAD_NS in all since that was read last.
    """

    _fd = -1  # Of the class: one that could not be made is deleted like any other.

    def __init__(self) -> None:
        self.ident = threading.get_ident()
        with suppress(OSError):  # No Linux, or a kernel without schedstat: the CPU time alone.
            self._fd = os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
            self._contents = _reader(self._fd)
        self.unread_ns = 0
        """For how long it was off its core since the run queue was read."""
        self._at_ns = _now()
        self.reading: Reading = (0, 0, 0)
        self._read(time.thread_time_ns())

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def queued_ns(self) -> int:
        """Return for how long it has been in a run queue; of another thread too."""
        return int(self._contents().split(None, 2)[1]) if self._fd >= 0 else 0

    def _read(self, ran_ns: int) -> None:
        self.unread_ns = 0
        self.reading = ran_ns, self.queued_ns(), _used(_THREAD).ru_nvcsw

    def look(self, at_ns: int, most_ns: int = UNREAD_NS) -> Reading:
        """Return what it says at *at_ns*, which is now, or said less than FLOOR_NS before.

        The run queue and the sleeps are as of an earlier look where the thread has not been off its
        core for more than *most_ns* since they were read.
        """
        if 0 <= at_ns - self._at_ns < FLOOR_NS:
            return self.reading
        ran_ns = time.thread_time_ns()
        self.unread_ns += max(0, at_ns - self._at_ns - (ran_ns - self.reading[0]))
        self._at_ns = at_ns
        if self.unread_ns > most_ns:
            self._read(ran_ns)
        else:
            self.reading = ran_ns, *self.reading[1:]
        return self.reading

    def begin(self, at_ns: int, handed_ns: int) -> Reading:
        """Return what it says at *at_ns*, when it begins what it was handed at *handed_ns*.

        Until then it slept, as far as is known, and waited for no core.
        """
        ran_ns = time.thread_time_ns()
        self.unread_ns += max(0, at_ns - handed_ns)
        self._at_ns = at_ns
        if self.unread_ns > UNREAD_NS or ran_ns - self.reading[0] > UNREAD_NS:
            self._read(ran_ns)
        else:
            self.reading = ran_ns, self.reading[1], _used(_THREAD).ru_nvcsw
        return self.reading


_local = threading.local()


def thread_clock() -> ThreadClock:
    """Return this thread's clock, made at its first use."""
    clock: ThreadClock | None = getattr(_local, "clock", None)
    if clock is None:
        clock = _local.clock = ThreadClock()
    return clock


def record(
    timeline: Timeline, code: int, begun_ns: int, ended_ns: int, before: Reading, after: Reading
) -> None:
    """Record that a thread was at work for *timeline*, and what of that time it had no core.

    *code* is CODE_RAN of a loop, or CODE_THREAD. *before* and *after* are the clock's readings.
    """
    if len(timeline.chain or ()) >= MOST_CHAINED and ended_ns - begun_ns < 1_000_000:
        return  # A stream of thousands of steps: the short ones stay with their stage.
    timeline.mark(code, begun_ns, ended_ns)
    idle_ns = max(0, ended_ns - begun_ns - (after[0] - before[0]))
    queued_ns = min(after[1] - before[1], idle_ns)
    off_ns = idle_ns - queued_ns
    if queued_ns >= FLOOR_NS:
        timeline.mark(fmt.CODE_QUEUED, begun_ns, begun_ns + queued_ns)
    if off_ns >= FLOOR_NS:
        times = bisect_right(fmt.TIMES_ON_CORE, after[2] - before[2]) - 1
        timeline.mark(fmt.CODE_OFF + times, begun_ns, begun_ns + off_ns)


def runs_a_loop() -> bool:
    """Return whether this thread runs an event loop, which does other things too while one is open."""
    aio = sys.modules.get("asyncio")  # Not loaded where nobody uses it.
    return aio is not None and aio._get_running_loop() is not None


class Stretch:
    """What a worker thread does from *begun_ns*, which is now, until `end`."""

    __slots__ = ("_after", "_before", "_begun_ns", "_clock", "_ended_ns", "_unread_ns")

    def __init__(self, begun_ns: int, handed_ns: int = 0) -> None:
        """*handed_ns* is when it was handed over to the thread, which slept until then; 0: not known."""
        clock = self._clock = thread_clock()
        self._before = clock.begin(begun_ns, handed_ns) if handed_ns else clock.look(begun_ns)
        self._unread_ns = clock.unread_ns
        self._begun_ns = begun_ns
        self._ended_ns = 0
        self._after = self._before

    def end(self, ended_ns: int) -> None:
        """Read the thread's clock; nothing where this is another thread, or it was too short."""
        clock = self._clock
        if ended_ns - self._begun_ns >= FLOOR_NS and clock.ident == threading.get_ident():
            self._ended_ns = ended_ns
            self._after = clock.look(ended_ns, self._unread_ns + FLOOR_NS)

    def record(self, timeline: Timeline) -> None:
        """Record that it was for the request of *timeline*, which may be one of several."""
        if self._ended_ns:
            record(
                timeline, fmt.CODE_THREAD, self._begun_ns, self._ended_ns, self._before, self._after
            )


def timed(
    timeline: Timeline,
    submitted_ns: int,
    handed_ns: int,
    function: Callable[..., Any],
    *args: Any,
    **named: Any,
) -> Any:
    """Call *function* in a worker thread, and record how it ran while its load run is open.

    *submitted_ns* is when it was given to an executor, from when on it is in `queue.threadpool`; 0
    where that is recorded elsewhere. *handed_ns* is the same moment, or one before it.
    """
    stretch = None
    with guarded(timeline.recorder):
        begun_ns = _now()
        stretch = Stretch(begun_ns, handed_ns)
        if submitted_ns and begun_ns - submitted_ns >= FLOOR_NS:
            timeline.mark(_THREADPOOL, submitted_ns, begun_ns)
    try:
        return function(*args, **named)
    finally:
        with guarded(timeline.recorder):
            if stretch is not None:
                stretch.end(_now())
                stretch.record(timeline)
