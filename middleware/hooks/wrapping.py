"""Puts `StageMiddleware` around the app that a server has loaded: outermost, and once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from stagescope import settings
from stagescope.middleware.asgi import Companion, StageMiddleware
from stagescope.middleware.hooks.installer import FrameworkHooks
from stagescope.middleware.recording.guard import fault
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.types import ASGIApp, Receive, Scope, Send

log = logging.getLogger("stagescope")

DEEPEST = 32
"""How far an app is searched for a middleware that is there already."""

beside: Callable[[Path], Companion | None] | None = None
"""What the middleware starts beside itself; the public package puts the embedded agent here."""


def wrap_app(app: Any) -> Any:
    """Return *app* in a `StageMiddleware`, or as it is where it has one of the user's already."""
    try:
        if any(isinstance(layer, StageMiddleware) for layer in _layers(app)):
            return app
        if _is_added(app):
            log.warning("stagescope: the app has added StageMiddleware itself; that one is used")
            return app
        return around(app)
    except Exception as error:
        if fault(error, None):
            raise
        return app


def _layers(app: Any) -> Iterator[Any]:
    """Yield the app and what it wraps, outermost first, as far as wrappers name it `app`."""
    for _ in range(DEEPEST):
        if app is None:
            return
        yield app
        app = getattr(app, "app", None)


def _is_added(app: Any) -> bool:
    """Return whether a Starlette app inside has `add_middleware(StageMiddleware)`."""
    for layer in _layers(app):
        for added in getattr(layer, "user_middleware", None) or ():
            kind = getattr(added, "cls", None)
            if isinstance(kind, type) and issubclass(kind, StageMiddleware):
                return True
    return False


def disabled() -> bool:
    """Return whether the environment turns stagescope off."""
    return settings.DISABLE.on()


def around(app: ASGIApp) -> StageMiddleware:
    """Put the middleware around *app*, with the hooks and what belongs beside it."""
    return StageMiddleware(app, installer=FrameworkHooks(), beside=beside)


def recorder() -> Recorder | None:
    """Return this process's recorder, opened with what belongs beside it; None where there is none."""
    return _opener().open()


@cache
def _opener() -> StageMiddleware:
    return around(_nothing)


async def _nothing(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("only opens the recorder")
