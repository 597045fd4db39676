"""Waking an event loop at an absolute time, finer than the loop's own timers.

asyncio's and uvloop's timers are rounded to whole milliseconds. On Linux the kernel keeps our
time instead (timerfd_create(2), CLOCK_MONOTONIC, absolute), at some ten microseconds and
without spinning; elsewhere the loop's timer wakes early and yields until it is time.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import time
from collections.abc import Callable
from typing import Protocol

_EARLY_NS = 1_500_000
_SECOND_NS = 1_000_000_000
_CLOCK_MONOTONIC = 1
_NONBLOCK_CLOEXEC = os.O_NONBLOCK | getattr(os, "O_CLOEXEC", 0)
_TIMER_ABSTIME = 1


class Timer(Protocol):
    """Calls its callback once for each setting."""

    def set(self, at_ns: int) -> None:
        """Call back at *at_ns* on `time.monotonic_ns`; at once where that is past."""

    def close(self) -> None:
        """Give back what it holds; no call comes after it."""


def alarm(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> Timer:
    """Return the finest alarm that this system has."""
    try:
        return KernelAlarm(loop, callback)
    except (AttributeError, OSError):
        return LoopAlarm(loop, callback)


class KernelAlarm:
    """Linux: a timer file descriptor in the loop's own poll.

    Raises AttributeError or OSError on construction where the system has none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        """Open the timer and have *loop* watch it."""
        libc = ctypes.CDLL(None, use_errno=True)
        self._settime = libc.timerfd_settime
        self._fd = libc.timerfd_create(_CLOCK_MONOTONIC, _NONBLOCK_CLOEXEC)
        if self._fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        # struct itimerspec: interval (s, ns), value (s, ns)
        self._spec = (ctypes.c_long * 4)()
        self._loop = loop
        self._callback = callback
        loop.add_reader(self._fd, self._fired)

    def set(self, at_ns: int) -> None:
        """Call back at *at_ns*; a time that is past fires at once (0 would disarm)."""
        self._spec[2], self._spec[3] = divmod(max(at_ns, 1), _SECOND_NS)
        self._settime(self._fd, _TIMER_ABSTIME, self._spec, None)

    def _fired(self) -> None:
        try:
            os.read(self._fd, 8)
        except BlockingIOError:  # set anew since the loop saw it
            return
        self._callback()

    def close(self) -> None:
        """Close the timer."""
        self._loop.remove_reader(self._fd)
        os.close(self._fd)


class LoopAlarm:
    """Any system: the loop's timer until shortly before, then yielding until it is time."""

    def __init__(self, loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> None:
        """Nothing is held yet."""
        self._loop = loop
        self._callback = callback
        self._handle: asyncio.Handle | None = None
        self._at_ns = 0

    def set(self, at_ns: int) -> None:
        """Call back at *at_ns*."""
        self.close()
        self._at_ns = at_ns
        early_s = (at_ns - _EARLY_NS - time.monotonic_ns()) / _SECOND_NS
        if early_s > 0:
            self._handle = self._loop.call_later(early_s, self._near)
        else:
            self._handle = self._loop.call_soon(self._near)

    def _near(self) -> None:
        if time.monotonic_ns() >= self._at_ns:
            self._handle = None
            self._callback()
        else:
            self._handle = self._loop.call_soon(self._near)

    def close(self) -> None:
        """Forget the setting."""
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
