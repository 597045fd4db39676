"""sse-starlette: what makes its server-sent events is the endpoint's work."""

from __future__ import annotations

from sse_starlette.sse import EventSourceResponse

from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.streams import streamed
from stagescope.middleware.patching import wrap


def _install() -> None:
    wrap(EventSourceResponse, "_stream_response", streamed)


HOOK = Hook("sse_starlette", "sse-starlette", ("2.2", "4"), _install)
