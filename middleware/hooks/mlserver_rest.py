"""MLServer's REST app: the middleware around it, and its own parsing and rendering of JSON."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagescope.middleware.asgi import SCOPE_KEY, StageMiddleware
from stagescope.middleware.hooks import entry
from stagescope.middleware.hooks.hook import PATCHED
from stagescope.middleware.marks import marked
from stagescope.middleware.names import CODES
from stagescope.middleware.stage import stage
from stagescope.middleware.types import ASGIApp, Receive, Scope, Send

PARSE = CODES["preprocess.parse"]
SERIALIZE = CODES["postprocess.serialize"]

_MIDDLEWARE = "app"
"""The attribute by which the hooks of web servers find a middleware that is there already."""


def creating(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of the REST app: it gets its middleware."""

    def create_and_mark(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        _middleware_of(app, getattr(type(app).__call__, PATCHED))
        return app

    return create_and_mark


def calling(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FastAPI's way in, for the REST app alone; one that was made before gets its own here."""

    async def call_inside(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        if SCOPE_KEY in scope or not _is_rest(self):
            await call(self, scope, receive, send)
        else:
            await _middleware_of(self, call)(scope, receive, send)

    return call_inside


def _is_rest(app: Any) -> bool:
    """Tell MLServer's REST app from that of its metrics, and from any other in the process."""
    from mlserver.rest.app import APIRoute

    return getattr(app.router, "route_class", None) is APIRoute


def _middleware_of(app: Any, call: Callable[..., Any]) -> StageMiddleware:
    found = vars(app).get(_MIDDLEWARE)
    if not isinstance(found, StageMiddleware):
        found = entry.around(_bound(app, call))
        setattr(app, _MIDDLEWARE, found)
    return found


def _bound(app: Any, call: Callable[..., Any]) -> ASGIApp:
    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        await call(app, scope, receive, send)

    return called


def parsed(json: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the parsing of a body; reading it is `preprocess.read` inside."""

    async def parse_timed(self: Any) -> Any:
        with stage.of_code(PARSE):
            return await json(self)

    return marked(parse_timed, PARSE)


def rendered(render: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the rendering of a response."""

    def render_timed(*args: Any, **kwargs: Any) -> Any:
        with stage.of_code(SERIALIZE):
            return render(*args, **kwargs)

    return marked(render_timed, SERIALIZE)
