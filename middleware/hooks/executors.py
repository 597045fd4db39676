"""Pools of the standard library: for whom their threads and processes work.

`asyncio.to_thread`, `loop.run_in_executor` (of asyncio and of uvloop) and an executor of the app's
own all hand a function to `ThreadPoolExecutor.submit`. Its thread then has a frame with the mark
of the stage that waits for it. No time is taken: `carry` does that.

While a load run lasts a `ProcessPoolExecutor` brings home, beside the result of a function, which
stages and model calls it was in there (see runtime/workers.py).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.runtime import workers
from stagescope.middleware.stage import in_other_thread


def _marking(submit: Callable[..., Any]) -> Callable[..., Any]:
    def marking(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        work = function
        with guarded():
            work = in_other_thread(function)
        return submit(pool, work, *args, **kwargs)

    return marking


def _install() -> None:
    wrap(ThreadPoolExecutor, "submit", _marking)


HOOK = Hook("asyncio", "asyncio", ("", "4"), _install)


def _reporting(submit: Callable[..., Any]) -> Callable[..., Any]:
    def reporting(pool: Any, function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        if workers.on:
            return submit(pool, workers.reporting, function, *args, **kwargs)
        return submit(pool, function, *args, **kwargs)

    return reporting


def _unpacking(set_result: Callable[..., None]) -> Callable[..., None]:
    def unpacking(future: Any, result: Any) -> None:
        set_result(future, workers.reported(result))

    return unpacking


def _install_processes() -> None:
    from concurrent.futures.process import ProcessPoolExecutor

    wrap(Future, "set_result", _unpacking)
    wrap(ProcessPoolExecutor, "submit", _reporting)


PROCESSES = Hook("concurrent.futures.process", "concurrent.futures", ("", "4"), _install_processes)
