"""uvicorn: the app is wrapped when a process has loaded it; so under gunicorn's UvicornWorker too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagescope.middleware.hooks.hook import Hook, wrap
from stagescope.middleware.hooks.outermost import outermost


def _install() -> None:
    from uvicorn.config import Config

    wrap(Config, "load", _loading)


def _loading(load: Callable[..., Any]) -> Callable[..., Any]:
    def load_and_wrap(config: Any) -> None:
        load(config)
        config.loaded_app = outermost(config.loaded_app)

    return load_and_wrap


HOOK = Hook("uvicorn", "uvicorn", ("0.20", "1"), _install)
