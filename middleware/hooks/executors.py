"""Pools of the standard library: for whom their threads and processes work.

`asyncio.to_thread`, `loop.run_in_executor` (of asyncio and of uvloop) and an executor of the app's
own all hand a function to `ThreadPoolExecutor.submit`. Its thread then has a frame with the mark
of the stage that waits for it.

While a load run lasts the wait for a thread is in `queue.threadpool`, what the thread did is
recorded for docs/waits.md, and a `ProcessPoolExecutor` brings home, beside the result of a function, which
stages and model calls it was in there (see runtime/workers.py).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES, intern
from stagescope.middleware.recording.timeline import current
from stagescope.middleware.runtime import workers
from stagescope.middleware.runtime.workers import Block
from stagescope.middleware.stage import in_other_thread


def _marking(submit: Callable[..., Any]) -> Callable[..., Any]:
    def marking(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        work = function
        with guarded():
            work = in_other_thread(function, time.monotonic_ns())
        return submit(pool, work, *args, **kwargs)

    return marking


def _install() -> None:
    wrap(ThreadPoolExecutor, "submit", _marking)


HOOK = Hook("asyncio", "asyncio", ("", "4"), _install)


class _Report:
    """What a function gave in another process, when it began, and the blocks it made there."""

    def __init__(self, result: Any, begun_ns: int, blocks: list[tuple[str, int, int]]) -> None:
        self.result = result
        self.begun_ns = begun_ns
        self.blocks = blocks


def reporting(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
    """Call *function* in a process of a pool, and report on its blocks beside its result."""
    begun_ns = time.monotonic_ns()
    worker = None
    with guarded():
        current.set(None)  # A forked process has the context of whichever request forked it.
        worker = workers.begin_anew()
    try:
        result = function(*args, **kwargs)
    finally:
        if worker is not None:
            with guarded():
                workers.switch_off(worker)
    if worker is None or worker.round is None:
        return result
    with guarded():
        names = {code: name for name, code in CODES.items()}
        now = time.monotonic_ns()
        blocks = [(names[b.code], b.start_ns, b.end_ns or now) for b in worker.round.blocks]
        return _Report(result, begun_ns, blocks)
    return result


def _reporting(submit: Callable[..., Any]) -> Callable[..., Any]:
    def submitted(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if workers.on:
            return submit(pool, reporting, function, *args, **kwargs)
        return submit(pool, function, *args, **kwargs)

    return submitted


def _unpacking(set_result: Callable[..., None]) -> Callable[..., None]:
    def unpacking(future: Any, result: Any) -> None:
        if isinstance(result, _Report):
            with guarded():
                blocks = [Block(intern(name), start, end) for name, start, end in result.blocks]
                workers.did(blocks, since_ns=result.begun_ns)
            result = result.result
        set_result(future, result)

    return unpacking


def _install_processes() -> None:
    from concurrent.futures.process import ProcessPoolExecutor

    wrap(Future, "set_result", _unpacking)
    wrap(ProcessPoolExecutor, "submit", _reporting)


PROCESSES = Hook("concurrent.futures.process", "concurrent.futures", ("", "4"), _install_processes)
