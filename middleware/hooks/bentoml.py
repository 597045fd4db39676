"""BentoML: the services' processes, their adaptive batches, and the calls between services.

What runs a batch is a task that BentoML starts in the first request of all: its context, and so
its current span, is that request's for ever. Here a batch has a context of its own.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import attr
from _bentoml_impl.client.http import HTTPClient
from _bentoml_impl.client.proxy2 import AsyncClient
from _bentoml_impl.server.app import ServiceAppFactory
from _bentoml_sdk.io_models import IOMixin
from _bentoml_sdk.method import APIMethod
from bentoml._internal.configuration.containers import BentoMLContainer
from bentoml._internal.marshal import dispatcher as dispatching
from bentoml._internal.marshal.dispatcher import CorkDispatcher, Job

from stagescope.identity import format_traceparent
from stagescope.middleware.batch import Ticket, batch
from stagescope.middleware.hooks import hook
from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.patching import PATCHED, wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.stage import carry, stage
from stagescope.recorder import format as fmt


def traceparent(running: batch | None) -> str | None:
    """Return the `traceparent` of the present request, else of the *running* batch.

    None outside of both, and where a span of BentoML's own tracing is the parent. That makes
    spans also where it exports none: as a parent, nobody would ever see them.
    """
    timeline = current.get() or (running.timeline if running else None)
    if timeline is None or timeline.done or _span_exported():
        return None
    return format_traceparent(
        timeline.trace_id.hex(), timeline.span_id.hex(), sampled=_sampled(timeline)
    )


def _span_exported() -> bool:
    if not BentoMLContainer.tracing.exporter_type.get():
        return False
    trace: Any = sys.modules.get("opentelemetry.trace")
    return trace is not None and bool(trace.get_current_span().is_recording())


def _sampled(timeline: Timeline) -> bool:
    return bool(timeline.slot.raw[fmt.OPENED_AT + 2] & fmt.FLAG_SAMPLED)


_THREADPOOL = CODES["queue.threadpool"]

LONG_WAIT_NS = 1_000_000
"""A stream needs a thread for each chunk; waits for one that are shorter are not written."""

running: ContextVar[batch | None] = ContextVar("stagescope_bentoml_batch", default=None)
"""The batch that this task or thread works for."""


class Waiting:
    """A request's place in a dispatcher's queue; where its input is split, in several batches."""

    def __init__(self) -> None:
        self._ticket = batch.enqueue()
        self._taken = False

    @property
    def timeline(self) -> Timeline | None:
        """Whose place it is."""
        return self._ticket.timeline if self._ticket else None

    def take(self) -> Ticket | None:
        """Return the ticket for the next batch."""
        ticket = self._ticket
        if self._taken and ticket is not None:
            ticket = Ticket(ticket.timeline, ticket.timeline.clock())
        self._taken = True
        return ticket


@attr.define
class TimedJob(Job[Any, Any]):  # type: ignore[misc] # BentoML is not there to be checked
    """A job that was made inside its request, and remembers it."""

    waiting: Waiting = attr.field(factory=Waiting)


def _named(init: Callable[..., None]) -> Callable[..., None]:
    def initialise(factory: Any, *args: Any, **kwargs: Any) -> None:
        init(factory, *args, **kwargs)
        with guarded():
            for name, dispatcher in factory.dispatchers.items():
                dispatcher.stagescope_model = f"{factory.name}.{name}"
                dispatcher.stagescope_next = batch(dispatcher.stagescope_model)

    return initialise


def _batched(call: Callable[..., Any]) -> Callable[..., Any]:
    """Time one batch: BentoML starts this in a task of its own, so what is set here stays here."""

    async def timed(dispatcher: Any, jobs: Any, *args: Any, **kwargs: Any) -> None:
        with guarded():
            _leave_first_request()
            formed = getattr(dispatcher, "stagescope_next", None) or batch()
            waiting = [job.waiting for job in jobs if isinstance(job, TimedJob)]
            formed.add(*(place.take() for place in waiting))
            formed.collate()
            running.set(formed)
            current.set(waiting[0].timeline if len(waiting) == 1 else None)
        try:
            await call(dispatcher, jobs, *args, **kwargs)
        finally:
            with guarded():
                formed.done()
                # From now on the dispatcher is free for the next one.
                dispatcher.stagescope_next = batch(getattr(dispatcher, "stagescope_model", ""))

    return timed


def _leave_first_request() -> None:
    """Take the first request's span off, where OpenTelemetry is there."""
    context: Any = sys.modules.get("opentelemetry.context")
    if context is not None:
        context.attach(context.Context())


def _called(local_call: Callable[..., Any]) -> Callable[..., Any]:
    """Time the API's own function: in a batch for all its members, else for the request."""

    def get(method: Any, instance: Any) -> Callable[..., Any]:
        function = local_call(method, instance)

        @functools.wraps(function)  # BentoML reads the attributes that this copies.
        def timed(*args: Any, **kwargs: Any) -> Any:
            formed = running.get()
            if formed is None:
                return _as_inference(function, *args, **kwargs)
            if inspect.iscoroutinefunction(method.func):
                return _in_batch(formed, function, *args, **kwargs)
            with formed.inference():
                return function(*args, **kwargs)

        return timed

    return get


def _as_inference(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with stage("inference"):
        result = function(*args, **kwargs)
    if inspect.iscoroutine(result):
        return _awaited(result)
    if inspect.isasyncgen(result):
        return _async_relay(result)
    if inspect.isgenerator(result):
        return _relay(result)
    return result


@stage("inference")
async def _awaited(result: Any) -> Any:
    return await result


@stage("inference")
async def _async_relay(outputs: Any) -> Any:
    async for output in outputs:
        yield output


@stage("inference")
def _relay(outputs: Any) -> Any:
    yield from outputs


async def _in_batch(formed: batch, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    with formed.inference():
        return await function(*args, **kwargs)


def _waiting_for_thread(to_thread: Callable[..., Any]) -> Callable[..., Any]:
    async def timed(factory: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        carried = _next if function is next else carry
        return await to_thread(factory, carried(function), *args, **kwargs)

    return timed


def _next(function: Callable[..., Any]) -> Callable[..., Any]:
    """Carry a stream's `next`, whose waits for a thread have an entry only if they are long."""
    timeline = current.get()
    if timeline is None:
        return function
    since = timeline.clock()

    def carried(*args: Any) -> Any:
        with guarded(timeline.recorder):
            if timeline.clock() - since > LONG_WAIT_NS:
                timeline.mark(_THREADPOOL, since, timeline.clock())
        return function(*args)

    return carried


def _time_classmethod(owner: Any, name: str, stage_name: str) -> None:
    inner = owner.__dict__[name].__func__
    if hasattr(inner, PATCHED):
        return
    timed = stage(stage_name)(inner)
    setattr(timed, PATCHED, inner)
    setattr(owner, name, classmethod(timed))


def _sent_along(build: Callable[..., Any]) -> Callable[..., Any]:
    """Name us as the parent of a call to another service."""

    def named(*args: Any, **kwargs: Any) -> Any:
        request = build(*args, **kwargs)
        with guarded():
            # The one client gives a request with headers, the other takes headers to fill.
            headers = getattr(request, "headers", None)
            if headers is None:
                headers = kwargs.get("headers", args[-1])
            if ours := traceparent(running.get()):
                headers["traceparent"] = ours
        return request

    return named


def _install() -> None:
    hook.install("uvicorn")  # It puts the middleware around the app of each service's process.
    wrap(ServiceAppFactory, "__init__", _named)
    wrap(ServiceAppFactory, "_to_thread", _waiting_for_thread)
    wrap(CorkDispatcher, "outbound_call", _batched)
    wrap(APIMethod, "_local_call", _called)
    wrap(HTTPClient, "_build_request", _sent_along)
    wrap(AsyncClient, "_build_payload", _sent_along)
    _time_classmethod(IOMixin, "from_http_request", "preprocess.parse")
    _time_classmethod(IOMixin, "to_http_response", "postprocess.serialize")
    dispatching.Job = TimedJob


HOOK = Hook("bentoml", "bentoml", ("1.4", "1.5"), _install)
