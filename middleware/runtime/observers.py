"""Lets somebody watch stages open and close, for as long as he wants, at no cost to all others.

`stage` and `batch` do not ask whether anybody watches: where somebody does, their methods are
replaced by ones that tell him. Python looks `__enter__` up on the class at each `with`, so this
takes effect at once, and its end too. It looks `__exit__` up at the same moment: of a stage that
is open already the end is not told.
"""

from __future__ import annotations

import os
from threading import Lock
from types import TracebackType
from typing import Protocol

from stagescope.middleware.batch import batch
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.stage import stage


class StageObserver(Protocol):
    """Is told in the thread that opens or closes, right after it was written down."""

    def opened(self, timeline: Timeline, index: int, code: int) -> None:
        """A stage of *code* was opened; *index* names it within *timeline*.

        *timeline* is a batch's own for its phases, a `Together` where code works for a batch.
        """

    def closed(self, timeline: Timeline, index: int, code: int) -> int | None:
        """It was closed; of a batch's phase perhaps one that opened before the observer came.

        What it gives is the device time of what closed, ns, where that is known by now.
        """
        ...


_observers: tuple[StageObserver, ...] = ()
_lock = Lock()

_plain_enter = stage.__enter__
_plain_exit = stage.__exit__
_plain_phase = batch._phase  # pyright: ignore[reportPrivateUsage]
_plain_end = batch._end  # pyright: ignore[reportPrivateUsage]


def observe(observer: StageObserver) -> None:
    """Tell *observer* of every stage and phase from now on."""
    global _observers
    with _lock:
        _observers = (*_observers, observer)
        _set(watched=True)


def leave(observer: StageObserver) -> None:
    """Tell *observer* no more; nothing where it was not told."""
    global _observers
    with _lock:
        _observers = tuple([one for one in _observers if one is not observer])
        _set(watched=bool(_observers))


def _set(*, watched: bool) -> None:
    stage.__enter__ = _enter if watched else _plain_enter  # type: ignore[method-assign]
    stage.__exit__ = _exit if watched else _plain_exit  # type: ignore[method-assign]
    batch._phase = _phase if watched else _plain_phase  # type: ignore[method-assign]  # pyright: ignore
    batch._end = _end if watched else _plain_end  # type: ignore[method-assign]  # pyright: ignore


def _enter(self: stage) -> None:
    another = self._timeline is not None  # pyright: ignore[reportPrivateUsage]
    _plain_enter(self)
    if another:
        return  # Open already: an object of its own was entered, and observed.
    timeline = self._timeline  # pyright: ignore[reportPrivateUsage]
    if isinstance(timeline, Timeline):
        _tell_opened(timeline, self._index, self._code)  # pyright: ignore[reportPrivateUsage]


def _exit(
    self: stage,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
) -> None:
    timeline = self._timeline  # pyright: ignore[reportPrivateUsage]
    _plain_exit(self, kind, error, traceback)
    if isinstance(timeline, Timeline):  # Else open more than once: what was left is told itself.
        _tell_closed(timeline, self._index, self._code)  # pyright: ignore[reportPrivateUsage]


def _phase(self: batch, code: int) -> None:
    timeline, index, before = self._timeline, self._index, self._code  # pyright: ignore
    _plain_phase(self, code)
    if timeline is not None and not timeline.done:
        _tell_closed(timeline, index, before)
        _tell_opened(timeline, self._index, code)  # pyright: ignore[reportPrivateUsage]


def _end(self: batch, error: bytes, *, failed: bool) -> None:
    timeline = self._timeline  # pyright: ignore[reportPrivateUsage]
    if timeline is not None and not timeline.done:
        # Before it is written down: an observer may still add to the batch (its device time).
        known_ns = _tell_closed(timeline, self._index, self._code)  # pyright: ignore[reportPrivateUsage]
        self.device_ns = self.device_ns or known_ns
    _plain_end(self, error, failed=failed)


def _tell_opened(timeline: Timeline, index: int, code: int) -> None:
    with guarded(timeline.recorder):
        for observer in _observers:
            observer.opened(timeline, index, code)


def _tell_closed(timeline: Timeline, index: int, code: int) -> int:
    device_ns = 0
    with guarded(timeline.recorder):
        for observer in _observers:
            device_ns = observer.closed(timeline, index, code) or device_ns
    return device_ns


def _fresh_lock_in_child() -> None:
    """A thread that the fork did not take along may hold the parent's."""
    global _lock
    _lock = Lock()


os.register_at_fork(after_in_child=_fresh_lock_in_child)
