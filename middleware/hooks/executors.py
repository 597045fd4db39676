"""Thread pools of the standard library: whose stage a worker thread works for, for stack samplers.

`asyncio.to_thread`, `loop.run_in_executor` (of asyncio and of uvloop) and an executor of the app's
own all hand a function to `ThreadPoolExecutor.submit`. Its thread then has a frame with the mark
of the stage that waits for it. No time is taken: `carry` does that.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
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
