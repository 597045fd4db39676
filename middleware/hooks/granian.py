"""granian: an ASGI app is wrapped where a worker hands it to the Rust server; RSGI is not timed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from stagescope.middleware.hooks.hook import Hook, wrap
from stagescope.middleware.hooks.outermost import outermost

SERVERS = ("granian.server.mp", "granian.server.mt", "granian.server.embed")
"""Worker processes, worker threads, inside the user's loop; not every Python has each."""


def _install() -> None:
    found = [sys.modules[name] for name in SERVERS if name in sys.modules]
    if not found:
        raise AttributeError(f"none of {', '.join(SERVERS)} is loaded")
    for server in found:
        wrap(server, "_asgi_call_wrap", _handing_over)


def _handing_over(call_wrap: Callable[..., Any]) -> Callable[..., Any]:
    def wrap_ours(callback: Any, *rest: Any) -> Any:
        return call_wrap(outermost(callback), *rest)

    return wrap_ours


HOOK = Hook("granian", "granian", ("2.0", "3"), _install)
