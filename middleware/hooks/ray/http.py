"""Ray Serve: an HTTP request, from the proxy into the replica that answers it."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from functools import cache
from types import TracebackType
from typing import Any

from stagescope.identity import boot_id
from stagescope.middleware.asgi import SCOPE_KEY, StageMiddleware
from stagescope.middleware.exchange import begin
from stagescope.middleware.hooks import wrapping
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES, intern
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.middleware.remote import AttachedTimeline, extract, inject
from stagescope.middleware.stage import stage
from stagescope.middleware.types import Message, Receive, Scope, Send
from stagescope.recorder import format as fmt

# Ray Serve: calls of one deployment by another, `handle.remote(...)`.
#
# The caller's note travels as one more attribute of the request's metadata, a plain tuple, so that
# a process without stagescope reads it without harm.


NOTE = "stagescope"
QUEUE = CODES["queue"]


def noting(get_metadata: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap what makes the metadata of a call, on the caller's side."""

    def get_and_note(*args: Any, **kwargs: Any) -> Any:
        metadata = get_metadata(*args, **kwargs)
        with guarded():
            metadata.__dict__[NOTE] = (_carrier(), arrived.get())
        return metadata

    return get_and_note


def _carrier() -> str:
    """Lend the present timeline, or tell its ids alone; empty where there is no one request."""
    timeline = current.get()
    if timeline is None or timeline.done or isinstance(timeline, TimelineGroup):
        return ""
    return inject() or ";".join(
        (timeline.trace_id.hex(), timeline.span_id.hex(), str(timeline.start_ns),
         str(timeline.clock()), "0", timeline.run.decode(), "")
    )  # fmt: skip


def called(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a user's method in the replica, on the user's loop."""

    async def run_timed(self: Any, metadata: Any, *args: Any, **kwargs: Any) -> Any:
        with Call(self, metadata):
            return await run(self, metadata, *args, **kwargs)

    return run_timed


def streamed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the call of a user's generator in the replica, where it runs to its end inside."""

    async def run_timed(
        self: Any, metadata: Any, *args: Any, enqueue: Callable[..., Any] | None = None
    ) -> Any:
        if enqueue is None:
            return await run(self, metadata, *args)
        with Call(self, metadata):
            return await run(self, metadata, *args, enqueue=enqueue)

    return run_timed


class Call:
    """One call in its replica: the caller's timeline where it can be had, else a record apart."""

    __slots__ = ("_metadata", "_replica", "_stage", "_timeline", "_token")

    def __init__(self, replica: Any, metadata: Any) -> None:
        self._replica = replica
        self._metadata = metadata
        self._timeline: Timeline | None = None
        self._stage: stage | None = None

    def __enter__(self) -> None:
        with guarded():
            self._timeline = self._take_up()
        self._token = current.set(self._timeline)
        with guarded():
            deployment = self._replica._deployment_id.name
            opened = stage(f"inference.{deployment}"[: fmt.NAME_BYTES - 1])
            opened.__enter__()
            self._stage = opened

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._stage is not None:
            self._stage.__exit__(kind, error, traceback)
        current.reset(self._token)
        if self._timeline is not None:
            with guarded(self._timeline.recorder):
                self._end(self._timeline, kind)

    def _take_up(self) -> Timeline | None:
        carrier, _ = self._metadata.__dict__.get(NOTE) or ("", None)
        recorder = wrapping.recorder() if carrier else None
        if recorder is None:
            return None
        attached = extract(carrier, recorder)
        if attached is not None:
            attached.close_at(attached.open_at(QUEUE, attached.lent_ns), attached.clock())
            return attached
        trace, span, _, _, _, run, _ = carrier.split(";", 6)
        headers = [(b"traceparent", f"00-{trace}-{span}-01".encode())]
        if run:
            headers.append((b"baggage", f"stagescope.run={run}".encode()))
        deployment = self._replica._deployment_id
        path = f"/{deployment.app_name}/{deployment.name}/{self._metadata.call_method}"
        return begin(recorder, {"headers": headers, "method": "CALL", "path": path})

    @staticmethod
    def _end(timeline: Timeline, kind: type[BaseException] | None) -> None:
        if isinstance(timeline, AttachedTimeline):
            timeline.done = True
            return
        error = kind.__name__.encode() if kind else b""
        timeline.finish(timeline.clock(), 0, 0, 0, 0, 0, 0, error, b"")


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
        with guarded():
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
    return wrapping.around(_enter)


async def _enter(scope: Scope, receive: Receive, send: Send) -> None:
    """What Ray would have called, inside our middleware."""
    run, replica, info, own_receive, own_send = scope.pop(_PARTS)
    timeline = current.get()
    if timeline is None or SCOPE_KEY not in scope:
        await run(replica, info, scope, own_receive, own_send)
        return
    with guarded(timeline.recorder):
        metadata = getattr(own_receive, "_request_metadata", None)
        _, arrival = getattr(metadata, NOTE, None) or ("", None)
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
