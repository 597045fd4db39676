"""A future that knows when it was ready, and whose work made it so."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.timeline import current
from stagescope.middleware.runtime import workers
from stagescope.middleware.runtime.workers import Round

_now = time.monotonic_ns


class StampedFuture(asyncio.Future[Any]):
    """A future that knows when its result was there, though nobody could take it yet."""

    ready_ns = 0
    due_ns = 0
    """When a timer was due to set it; 0 without one."""
    exact = False
    """True where nothing but the loop came after: code of the process made it ready."""
    answer: Round | None = None
    """What a worker did before it made this ready."""

    def stamp(self, *, exact: bool, at_ns: int = 0) -> None:
        """Note that it is ready now, or was *at_ns*; only the first time counts."""
        if not self.ready_ns:
            self.ready_ns = at_ns or _now()
            self.exact = exact

    def set_result(self, result: Any) -> None:
        with guarded():
            self._made_ready(_present_task(self))
        super().set_result(result)

    def set_exception(self, exception: Any) -> None:
        with guarded():
            self._made_ready(_present_task(self))
        super().set_exception(exception)

    def cancel(self, msg: Any = None) -> bool:
        with guarded():
            if not self.done():
                self.stamp(exact=_present_task(self) is not None)
        return super().cancel(msg)

    def _made_ready(self, task: asyncio.Task[Any] | None) -> None:
        """Note when, and what the worker did whose answer this is; *task* is the present one."""
        answering: tuple[Round, int] | None = getattr(_local, "answering", None)
        if answering is not None:
            done, at_ns = answering
            self.stamp(exact=True, at_ns=at_ns)
            self._hand_over(done)
            return
        # In a task its code made it ready; else a callback: a timer, or bytes that came.
        self.stamp(exact=task is not None)
        worker = workers.worker_of(task) if task is not None else None
        # `Queue.get` wakes those who wait to put: that is no answer.
        if worker is not None and sys._getframe(3).f_code is not _QUEUE_GET:  # pyright: ignore[reportPrivateUsage]
            done_here = worker.wake(self.ready_ns)
            if done_here is not None:
                self._hand_over(done_here)

    def _hand_over(self, done: Round) -> None:
        self.answer = done
        for callback, context in self._callbacks or ():
            waiter = getattr(callback, "args", None)  # `wait_for`, until 3.11
            if waiter and isinstance(waiter[0], StampedFuture):
                waiter[0].answer = done
                waiter[0].stamp(exact=self.exact, at_ns=self.ready_ns)
            task = getattr(callback, "__self__", None)
            if isinstance(task, asyncio.Task):
                timeline = context.get(current)
                if timeline is not None and not timeline.done:
                    workers.woken(timeline, done)
                else:  # A batcher: its answer is made of this one.
                    worker = workers.worker_of(task, make=True)
                    assert worker is not None
                    worker.adopt(done)


def made_ready_by(callback: Any, args: tuple[Any, ...]) -> Any:
    """Return the future that a call of *callback* with *args* makes ready, as far as can be seen."""
    target = args[0] if args else None
    if not asyncio.isfuture(target):
        target = getattr(callback, "__self__", None)
        waiting = getattr(target, "_getters", None)  # `(queue.put_nowait, item)`
        if waiting:
            target = waiting[0]
    return target


def answers_of(awaited: Any) -> list[Round]:
    """Return what workers did before they made *awaited* ready."""
    if isinstance(awaited, StampedFuture):
        return [awaited.answer] if awaited.answer is not None else []
    found: list[Round] = []
    for child in getattr(awaited, "_children", None) or ():  # `asyncio.gather`
        found += answers_of(child)
    return found


_QUEUE_GET = asyncio.Queue.get_nowait.__code__


def _present_task(future: StampedFuture) -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task(future.get_loop())
    except RuntimeError:
        return None  # In another thread, against asyncio's rules.


_local = threading.local()
"""While a callback runs that a worker asked for: what it did, and when it asked."""


def answer(answering: tuple[Round, int], callback: Callable[..., Any], *args: Any) -> Any:
    """Call *callback*, which a worker asked for: what it makes ready is the worker's answer."""
    _local.answering = answering
    try:
        return callback(*args)
    finally:
        _local.answering = None
