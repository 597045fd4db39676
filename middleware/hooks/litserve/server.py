"""LitServe: API server, queue and spawned inference worker, as one timeline a request.

Here is the API server's side; `litserve_worker` is the other. The timeline goes along in the
request's id, for a payload may be of any type, and the id is a text to LitServe on both sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import litserve.server
from litserve.server import LitServer

from stagescope.middleware.hooks import hook
from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.litserve.worker import inference_worker
from stagescope.middleware.patching import wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.remote import carried


class LendingQueue:
    """The queue to the workers, which lends them the timeline of each request put into it."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def put(self, item: Any, *args: Any, **kwargs: Any) -> None:
        """Put *item*, a tuple (response queue, id, stamp, payload)."""
        self._inner.put(_lent(item), *args, **kwargs)

    def put_nowait(self, item: Any) -> None:
        """Put *item*, without waiting."""
        self._inner.put_nowait(_lent(item))

    def __getattr__(self, name: str) -> Any:
        if name == "_inner":  # Not there yet, while being copied.
            raise AttributeError(name)
        return getattr(self._inner, name)

    def __reduce__(self) -> tuple[Callable[[Any], Any], tuple[Any]]:
        return _bare, (self._inner,)


def _bare(queue: Any) -> Any:
    """Return what arrives in another process for a LendingQueue: the queue itself."""
    return queue


def _lent(item: Any) -> Any:
    with guarded():
        response_queue, request_id, *rest = item
        if isinstance(request_id, str):
            return (response_queue, carried(request_id), *rest)
    return item


def _lending(get_queue: Callable[..., Any]) -> Callable[..., Any]:
    def get_lending_queue(server: Any, api_path: str) -> LendingQueue:
        return LendingQueue(get_queue(server, api_path))

    return get_lending_queue


def _install() -> None:
    hook.install("uvicorn")  # It puts the middleware around the app of each API server.
    wrap(LitServer, "_get_request_queue", _lending)
    # Not by `wrap`: a process to be spawned finds its function by the name that it goes by.
    litserve.server.inference_worker = inference_worker


HOOK = Hook("litserve", "litserve", ("0.2.10", "0.3"), _install)
