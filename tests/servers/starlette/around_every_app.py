"""A pytest plugin: every app that Starlette's test client is given is wrapped by StageMiddleware."""

from __future__ import annotations

from typing import Any

from starlette import testclient

from stagescope import StageMiddleware


def pytest_configure() -> None:
    """Wrap the client's constructor; the middleware starts the embedded agent by itself."""
    module: Any = testclient  # what is private in it is needed too
    make = module.TestClient.__init__

    def make_around(self: Any, app: Any, *args: Any, **kwargs: Any) -> None:
        app = app if module._is_asgi3(app) else module._WrapASGI2(app)
        make(self, StageMiddleware(app), *args, **kwargs)

    module.TestClient.__init__ = make_around
