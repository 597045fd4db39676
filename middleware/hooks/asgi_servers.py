"""uvicorn: the app is wrapped when a process has loaded it; so under gunicorn's UvicornWorker too."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.wrapping import wrap_app
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded


def _install_uvicorn() -> None:
    from uvicorn.config import Config

    wrap(Config, "load", _loading_config)


def _loading_config(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_and_wrap(config: Any) -> None:
        load(config)
        with guarded():
            config.loaded_app = wrap_app(config.loaded_app)

    return load_and_wrap


UVICORN = Hook("uvicorn", "uvicorn", ("0.20", "1"), _install_uvicorn)


def _install_gunicorn() -> None:
    from gunicorn.workers.gasgi import ASGIWorker  # type: ignore[import-untyped]

    wrap(ASGIWorker, "load_wsgi", _loading_worker)


def _loading_worker(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_and_wrap(worker: Any) -> None:
        load(worker)
        with guarded():
            worker.asgi = wrap_app(worker.asgi)

    return load_and_wrap


GUNICORN = Hook("gunicorn.workers.gasgi", "gunicorn", ("24", "28"), _install_gunicorn)


def _install_hypercorn() -> None:
    from hypercorn.app_wrappers import ASGIWrapper

    wrap(ASGIWrapper, "__init__", _wrapping)


def _wrapping(init: Callable[..., Any]) -> Callable[..., Any]:
    def init_with_ours(wrapper: Any, app: Any) -> None:
        with guarded():
            app = wrap_app(app)
        init(wrapper, app)

    return init_with_ours


HYPERCORN = Hook("hypercorn", "hypercorn", ("0.14", "1"), _install_hypercorn)


SERVERS = ("granian.server.mp", "granian.server.mt", "granian.server.embed")
"""Worker processes, worker threads, inside the user's loop; not every Python has each."""


def _install_granian() -> None:
    found = [sys.modules[name] for name in SERVERS if name in sys.modules]
    if not found:
        raise AttributeError(f"none of {', '.join(SERVERS)} is loaded")
    for server in found:
        wrap(server, "_asgi_call_wrap", _handing_over)


def _handing_over(call_wrap: Callable[..., Any]) -> Callable[..., Any]:
    def wrap_ours(callback: Any, *rest: Any) -> Any:
        with guarded():
            callback = wrap_app(callback)
        return call_wrap(callback, *rest)

    return wrap_ours


GRANIAN = Hook("granian", "granian", ("2.0", "3"), _install_granian)
