"""The app that a server has loaded gets one middleware: ours outside, or the user's own."""

import logging
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from uvicorn.config import Config

from stagescope import StageMiddleware
from stagescope.middleware import asgi
from stagescope.middleware.hooks.wrapping import wrap_app


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Serve nothing."""


class Around:
    """A user's own middleware."""

    def __init__(self, inner: Any) -> None:
        self.app = inner


def test_an_app_is_wrapped_once() -> None:
    """What has been wrapped is not wrapped again."""
    wrapped = wrap_app(app)
    assert isinstance(wrapped, asgi.StageMiddleware)
    assert wrapped.app is app
    assert wrap_app(wrapped) is wrapped


def test_the_users_own_stays() -> None:
    """A StageMiddleware that the user has put somewhere inside is the one that is used."""
    mine = Around(StageMiddleware(app, service="mine"))
    assert wrap_app(mine) is mine


def test_an_added_one_stays_and_that_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """So does one that was given to `add_middleware`, which is only built later."""
    mine = Around(Starlette(middleware=[Middleware(StageMiddleware)]))
    with caplog.at_level(logging.WARNING, "stagescope"):
        assert wrap_app(mine) is mine
    assert [record.message for record in caplog.records] == [
        "stagescope: the app has added StageMiddleware itself; that one is used"
    ]


def test_an_app_that_wraps_itself_ends_the_search() -> None:
    """A chain of `app` that never ends is given up."""
    circle = Around(None)
    circle.app = circle
    assert wrap_app(circle).app is circle


def test_the_hook_of_uvicorn_is_what_wraps() -> None:
    """`stagescope.install("uvicorn")`, twice: one middleware, around all of uvicorn's own."""
    import stagescope
    from stagescope.middleware.hooks import hook
    from stagescope.middleware.hooks import wrapping as module

    load, beside = Config.load, module.beside
    try:
        assert stagescope.install("uvicorn")
        assert stagescope.install("uvicorn")
        config = Config(app, proxy_headers=True)
        config.load()
    finally:
        Config.load = load  # type: ignore[method-assign]
        module.beside = beside
        hook._installed.discard("uvicorn")
    assert isinstance(config.loaded_app, asgi.StageMiddleware)
    assert not isinstance(config.loaded_app.app, asgi.StageMiddleware)
