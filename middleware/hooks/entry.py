"""This process's way in, for hooks of servers that have no ASGI app of ours in every process."""

from __future__ import annotations

import os
from functools import cache

from stagescope.middleware.asgi import DISABLE_VARIABLE, StageMiddleware
from stagescope.middleware.hooks import outermost
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.types import ASGIApp, Receive, Scope, Send


def disabled() -> bool:
    """Tell whether the environment turns stagescope off."""
    return os.environ.get(DISABLE_VARIABLE, "") not in ("", "0")


def around(app: ASGIApp) -> StageMiddleware:
    """Put the middleware around *app*, with what belongs beside it."""
    return StageMiddleware(app, beside=outermost.beside)


def recorder() -> Recorder | None:
    """Give this process's recorder, opened with what belongs beside it; None where there is none."""
    return _opener().open()


@cache
def _opener() -> StageMiddleware:
    return around(_nothing)


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("only opens the recorder")
