"""anyio: waiting for a worker thread (`queue.threadpool`), apart from running in it.

Starlette and FastAPI run every `def` endpoint, dependency, background task and file read through
`anyio.to_thread.run_sync`, which lends out 40 threads at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import anyio.to_thread

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.runtime import pauses
from stagescope.middleware.stage import in_other_thread

_THREADPOOL = CODES["queue.threadpool"]

WAITS_TIMED_APART = 16
"""Waits of one request with an entry each; a file or a stream needs a thread for each chunk."""

LONG_WAIT_NS = 1_000_000
"""Of the later ones only those longer than this get an entry, written with hindsight."""


def _timed(run_sync: Callable[..., Any]) -> Callable[..., Any]:
    async def timed(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        timeline = current.get()
        if pauses.pool is None:
            pauses.pool = anyio.to_thread.current_default_thread_limiter()
        if timeline is None or timeline.done:
            return await run_sync(function, *args, **options)
        work, wait = function, None
        with guarded(timeline.recorder):
            marked = in_other_thread(function)
            wait = _Wait(timeline)
            work = functools.partial(wait.run, marked)
        try:
            return await run_sync(work, *args, **options)
        finally:
            with guarded(timeline.recorder):
                if wait is not None:
                    wait.end()  # Cancelled before a thread was free.

    return timed


class _Wait:
    """From the call to the first line of the function in its thread."""

    __slots__ = ("_index", "_since_ns", "_timeline", "_waiting")

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._waiting = True
        self._index = -1
        self._since_ns = timeline.clock()
        timeline.waits += 1
        if timeline.waits <= WAITS_TIMED_APART:
            self._index = timeline.open_at(_THREADPOOL, self._since_ns)

    def run(self, function: Callable[..., Any], *args: Any) -> Any:
        """Stop waiting and call *function*."""
        with guarded(self._timeline.recorder):
            self.end()
        return function(*args)

    def end(self) -> None:
        """Stop waiting; a second call does nothing."""
        if not self._waiting:
            return
        self._waiting = False
        timeline = self._timeline
        now = timeline.clock()
        if self._index >= 0:
            timeline.close_at(self._index, now)
        elif now - self._since_ns > LONG_WAIT_NS:
            timeline.close_at(timeline.open_at(_THREADPOOL, self._since_ns), now)


def _install() -> None:
    wrap(anyio.to_thread, "run_sync", _timed)


HOOK = Hook("anyio", "anyio", ("4", "5"), _install)
