"""hypercorn: an ASGI app is wrapped where a worker, or `serve()`, makes it one of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from stagescope.middleware.hooks.hook import Hook, wrap
from stagescope.middleware.hooks.outermost import outermost


def _install() -> None:
    from hypercorn.app_wrappers import ASGIWrapper

    wrap(ASGIWrapper, "__init__", _wrapping)


def _wrapping(init: Callable[..., Any]) -> Callable[..., Any]:
    def init_with_ours(wrapper: Any, app: Any) -> None:
        init(wrapper, outermost(app))

    return init_with_ours


HOOK = Hook("hypercorn", "hypercorn", ("0.14", "1"), _install)
