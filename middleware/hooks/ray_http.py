"""Ray Serve: an HTTP request, from the proxy into the replica that answers it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

from stagescope import recorder_format as fmt
from stagescope.middleware.asgi import SCOPE_KEY, StageMiddleware
from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks import entry, ray_calls
from stagescope.middleware.names import CODES, intern
from stagescope.middleware.stage import stage
from stagescope.middleware.timeline import Timeline, current
from stagescope.middleware.types import Message, Receive, Scope, Send
from stagescope.run_folder import boot_id

_INGRESS = CODES["queue.ingress"]
_PARTS = "stagescope.ray"
_START_WORD = (fmt.OPENED_AT + 8) // 8

Arrival = tuple[int, str]
"""Monotonic ns, and the boot id of the host whose clock that is."""

arrived: ContextVar[Arrival | None] = ContextVar("stagescope_arrived", default=None)
"""When the proxy took the present request."""


def arriving(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the proxy's ASGI app: it notes when a request came, and passes on no timeline.

    The scope is pickled for the replica, so nothing of ours may stay in it.
    """

    async def note_and_call(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        arrived.set((time.monotonic_ns(), _boot()))
        if scope.pop(SCOPE_KEY, None) is not None:
            current.set(None)
        await call(self, scope, receive, send)

    return note_and_call


def left_alone(apply_middlewares: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of the proxy's app: the ingress replica has the record, not the proxy."""

    def apply_and_mark(*args: Any, **kwargs: Any) -> Any:
        return _Proxy(apply_middlewares(*args, **kwargs))

    return apply_and_mark


class _Proxy:
    """The proxy's app, for the hooks of web servers: they look for our middleware along `app`."""

    def __init__(self, proxy: Any) -> None:
        self._proxy = proxy
        self.app = StageMiddleware(_passed)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._proxy(scope, receive, send)


async def _passed(scope: Scope, receive: Receive, send: Send) -> None:
    raise AssertionError("stands for the replicas' middleware; it is never called")


def entered(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the handling of an HTTP request in the replica, on the user's loop."""

    async def run_timed(self: Any, info: Any, scope: Scope, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await run(self, info, scope, receive, send)
            return
        scope[_PARTS] = run, self, info, receive, send
        await _middleware()(scope, receive, send)

    return run_timed


@cache
def _middleware() -> StageMiddleware:
    return entry.around(_enter)


async def _enter(scope: Scope, receive: Receive, send: Send) -> None:
    """What Ray would have called, inside our middleware."""
    run, replica, info, own_receive, own_send = scope.pop(_PARTS)
    timeline = current.get()
    if timeline is None or SCOPE_KEY not in scope:
        await run(replica, info, scope, own_receive, own_send)
        return
    with guarded(timeline.recorder):
        metadata = getattr(own_receive, "_request_metadata", None)
        _, arrival = getattr(metadata, ray_calls.NOTE, None) or ("", None)
        if arrival is not None and arrival[1] == _boot():
            _begin_at(timeline, arrival[0])
    if hasattr(own_receive, "fetch_until_disconnect"):
        receive = _Fetching(receive, own_receive)
    send = _checked(send, own_send)
    if info.is_asgi_app:
        await run(replica, info, scope, receive, send)
    else:
        with stage.of_code(intern("endpoint")):
            await run(replica, info, scope, receive, send)


def _begin_at(timeline: Timeline, since_ns: int) -> None:
    """Let the timeline begin when the proxy took the request, and charge the way to here."""
    now_ns = timeline.start_ns
    if 0 < since_ns < now_ns:
        timeline.start_ns = timeline.slot.words[_START_WORD] = since_ns
        timeline.close_at(timeline.open_at(_INGRESS, since_ns), now_ns)


class _Fetching:
    """Our `receive`, with the attribute by which Ray knows its own."""

    def __init__(self, receive: Receive, own: Any) -> None:
        self._receive = receive
        self.fetch_until_disconnect = own.fetch_until_disconnect

    def __call__(self) -> Awaitable[Message]:
        return self._receive()


def _checked(send: Send, own: Send) -> Send:
    """Our `send` for messages; Ray hands what a generator yields to the same function."""

    def send_message(message: Message) -> Awaitable[None]:
        return send(message) if isinstance(message, dict) else own(message)

    return send_message


@cache
def _boot() -> str:
    return boot_id()
