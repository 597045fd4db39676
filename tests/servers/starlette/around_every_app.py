"""A pytest plugin: every app that Starlette's test client is given is wrapped by StageMiddleware."""

from __future__ import annotations

from typing import Any

from starlette import testclient

from stagescope import StageMiddleware


def pytest_configure() -> None:
    """Wrap the client's constructor; the middleware starts the embedded agent by itself."""
    make: Any = testclient.TestClient.__init__

    def make_around(self: Any, app: Any, /, *args: Any, **kwargs: Any) -> None:
        app = app if testclient._is_asgi3(app) else testclient._WrapASGI2(app)
        make(self, StageMiddleware(app), *args, **kwargs)

    testclient.TestClient.__init__ = make_around  # type: ignore[method-assign]
