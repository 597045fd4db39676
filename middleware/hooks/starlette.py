"""Starlette: bodies, JSON, streams, the template of the route, and what stands in the way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import starlette.requests
import starlette.responses
import starlette.routing

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.streams import streamed
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import fault, guarded, say_once
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import NOWHERE, current
from stagescope.middleware.route import MOUNT_KEY
from stagescope.middleware.stage import is_failure, marked, stage
from stagescope.middleware.types import ASGIApp, Receive, Scope, Send

PARSE = CODES["preprocess.parse"]
SERIALIZE = CODES["postprocess.serialize"]


def staged(code: int) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Make a wrapper that charges an async function to the stage *code*."""

    def make(inner: Callable[..., Any]) -> Callable[..., Any]:
        async def timed(*args: Any, **kwargs: Any) -> Any:
            timeline = current.get()
            if timeline is None or timeline.nesting is not None:
                with stage.of_code(code):
                    return await inner(*args, **kwargs)
            index = NOWHERE
            try:
                index = timeline.open(code)  # As `stage` does, in half of its time.
            except Exception as problem:
                if fault(problem, timeline.recorder):
                    raise
            try:
                result = await inner(*args, **kwargs)
            except BaseException as error:
                with guarded(timeline.recorder):
                    failed = is_failure(type(error), error)
                    timeline.close_at(index, timeline.clock(), failed=failed)
                raise
            try:
                timeline.close(index)
            except Exception as problem:
                if fault(problem, timeline.recorder):
                    raise
            return result

        return marked(timed, code)

    return make


def _rendered(render: Callable[..., Any]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with stage.of_code(SERIALIZE):
            return render(*args, **kwargs)

    return marked(timed, SERIALIZE)


def _mounted(handle: Callable[..., Any]) -> Callable[..., Any]:
    async def noted(mount: Any, scope: Scope, receive: Receive, send: Send) -> None:
        with guarded():
            prefix, _ = scope.get(MOUNT_KEY, ("", None))
            path = getattr(mount, "path_format", "").removesuffix("/{path}")
            scope[MOUNT_KEY] = (prefix + path, scope.get("route"))
        await handle(mount, scope, receive, send)

    return noted


def _routed(handle: Callable[..., Any]) -> Callable[..., Any]:
    async def noted(route: Any, scope: Scope, receive: Receive, send: Send) -> None:
        scope.setdefault("route", route)  # Older ones do not.
        await handle(route, scope, receive, send)

    return noted


def _install() -> None:
    wrap(starlette.requests.Request, "json", staged(PARSE))
    # `form()` gives an object that is awaited or entered; this is where it parses.
    wrap(starlette.requests.Request, "_get_form", staged(PARSE))
    wrap(starlette.responses.JSONResponse, "render", _rendered)
    wrap(starlette.responses.StreamingResponse, "stream_response", streamed)
    wrap(starlette.routing.Mount, "handle", _mounted)
    wrap(starlette.routing.Route, "handle", _routed)


HOOK = Hook("starlette", "starlette", ("0.36", "2"), _install)


def advise(inner: ASGIApp, scope: Scope, ours: type[Any]) -> None:
    """Say, once, what in the app keeps its middleware *ours* from seeing the whole request.

    *inner* is the app that ours wraps, *scope* the first connection that it saw.
    """
    around = scope.get("app")
    app = around if around is not None else _application(inner)
    stack = [entry.cls for entry in getattr(app, "user_middleware", ())]
    if around is not None:
        _advise_outermost(stack, ours)
    _advise_base_http(stack)


def _application(app: Any) -> Any:
    """Find the Starlette application behind plain ASGI wrappers."""
    for _ in range(32):
        if app is None or hasattr(app, "user_middleware"):
            return app
        app = getattr(app, "app", None)
    return None


def _advise_outermost(stack: list[Any], ours: type[Any]) -> None:
    own = [at for at, cls in enumerate(stack) if isinstance(cls, type) and issubclass(cls, ours)]
    if own and own[0] == 0:
        return
    outside = ", ".join(_name(cls) for cls in stack[: own[0]]) if own else "a whole application"
    say_once(
        f"StageMiddleware is not the outermost: {outside} runs before it, and that time is not "
        "seen; add it after all other middleware (`app.add_middleware(StageMiddleware)` last), "
        "or wrap the app (`app = StageMiddleware(app)`)"
    )


def _advise_base_http(stack: list[Any]) -> None:
    from starlette.middleware.base import BaseHTTPMiddleware

    found = [cls for cls in stack if isinstance(cls, type) and issubclass(cls, BaseHTTPMiddleware)]
    if found:
        say_once(
            f"{', '.join(_name(cls) for cls in found)}: a BaseHTTPMiddleware (also "
            '`@app.middleware("http")`) runs the app in a task of its own and hands every chunk '
            "on through a queue; stages stay right, what it costs counts as `other`, and what "
            "runs outside it sees the end of a response late; pure ASGI middleware costs nothing"
        )


def _name(cls: Any) -> str:
    return str(getattr(cls, "__name__", cls))
