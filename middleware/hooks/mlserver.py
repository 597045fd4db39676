"""MLServer: what is wrapped where. A server process (REST, batching) and a pool of spawned workers.

Everything is wrapped on classes, so that it also takes when the server runs already: a user's
line stands in the model's module, which MLServer imports after its own start, in the server and
in each worker.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextvars import ContextVar
from functools import wraps
from threading import local
from typing import Any

import mlserver.rest.server
from fastapi import FastAPI
from mlserver import MLModel
from mlserver.batching.adaptive import AdaptiveBatcher
from mlserver.batching.requests import BatchedRequests
from mlserver.codecs import base
from mlserver.codecs.decorator import SignatureCodec
from mlserver.parallel.dispatcher import Dispatcher
from mlserver.parallel.worker import Worker
from mlserver.rest.requests import Request
from mlserver.rest.responses import Response

from stagescope.middleware.asgi import SCOPE_KEY, StageMiddleware
from stagescope.middleware.batch import Ticket, batch, working_for
from stagescope.middleware.hooks import wrapping
from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.hooks.wrapping import disabled
from stagescope.middleware.patching import PATCHED, wrap
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.middleware.remote import AttachedTimeline, extract, inject
from stagescope.middleware.stage import marked, stage
from stagescope.middleware.types import ASGIApp, Receive, Scope, Send

# MLServer's adaptive batching, which runs in the server process.
#
# The merged request has no id, and the headers of one member alone; so the members are kept beside
# it, by the identity of the objects, and never travel with it.


_TICKETS = "_stagescope_tickets"

_forming: ContextVar[tuple[batch, dict[int, Ticket | None]] | None] = ContextVar(
    "stagescope_forming", default=None
)
_formed: dict[int, batch] = {}
"""By the id of their merged request, from the merging until the model takes it."""


def queueing(predict: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a request's way through the batcher."""

    async def queue_and_predict(self: Any, request: Any) -> Any:
        tickets: dict[int, Ticket | None] = vars(self).setdefault(_TICKETS, {})
        tickets[id(request)] = batch.enqueue()
        try:
            return await predict(self, request)
        finally:
            tickets.pop(id(request), None)

    return queue_and_predict


def forming(batches: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the batcher's loop. It never waits for the model, so it is always free for the next."""

    async def form(self: Any) -> AsyncIterator[Any]:
        inner = batches(self)
        try:
            while True:
                formed = batch(model=self._model.name)
                _forming.set((formed, vars(self).get(_TICKETS, {})))
                try:
                    merged = await anext(inner)
                except StopAsyncIteration:
                    return
                yield merged
        finally:
            await inner.aclose()

    return form


def merging(merge: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the merging of the members: the batch has closed."""

    def merge_timed(self: Any) -> Any:
        present = _forming.get()
        if present is None:
            return merge(self)
        formed, tickets = present
        _forming.set(None)
        with guarded():
            formed.add(*(tickets.get(id(one)) for one in self.inference_requests.values()))
        with formed.collate():
            merged = merge(self)
        _formed[id(merged)] = formed
        return merged

    return merge_timed


def take(request: object) -> batch | None:
    """Return the batch whose merged request this is; None for a request of its own."""
    return _formed.pop(id(request), None)


PARSE = CODES["preprocess.parse"]
SERIALIZE = CODES["postprocess.serialize"]

_MIDDLEWARE = "app"
"""The attribute by which the hooks of web servers find a middleware that is there already."""


def creating(create: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of the REST app: it gets its middleware."""

    def create_and_mark(*args: Any, **kwargs: Any) -> Any:
        app = create(*args, **kwargs)
        _middleware_of(app, getattr(type(app).__call__, PATCHED))
        return app

    return create_and_mark


def calling(call: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap FastAPI's way in, for the REST app alone; one that was made before gets its own here."""

    async def call_inside(self: Any, scope: Scope, receive: Receive, send: Send) -> None:
        if SCOPE_KEY in scope or not _is_rest(self):
            await call(self, scope, receive, send)
        else:
            await _middleware_of(self, call)(scope, receive, send)

    return call_inside


def _is_rest(app: Any) -> bool:
    """Tell MLServer's REST app from that of its metrics, and from any other in the process."""
    from mlserver.rest.app import APIRoute

    return getattr(app.router, "route_class", None) is APIRoute


def _middleware_of(app: Any, call: Callable[..., Any]) -> StageMiddleware:
    found = vars(app).get(_MIDDLEWARE)
    if not isinstance(found, StageMiddleware):
        found = wrapping.around(_bound(app, call))
        setattr(app, _MIDDLEWARE, found)
    return found


def _bound(app: Any, call: Callable[..., Any]) -> ASGIApp:
    async def called(scope: Scope, receive: Receive, send: Send) -> None:
        await call(app, scope, receive, send)

    return called


def parsed(json: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the parsing of a body; reading it is `preprocess.read` inside."""

    async def parse_timed(self: Any) -> Any:
        with stage.of_code(PARSE):
            return await json(self)

    return marked(parse_timed, PARSE)


def rendered(render: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the rendering of a response."""

    def render_timed(*args: Any, **kwargs: Any) -> Any:
        with stage.of_code(SERIALIZE):
            return render(*args, **kwargs)

    return marked(render_timed, SERIALIZE)


# MLServer's codecs: decoding is `preprocess.parse`, encoding `postprocess.serialize`.
#
# Models call them inside `predict`, by `self.decode(...)`, by a decorator or by name; a codec that
# calls another one counts once.


_METHODS = {
    "decode_input": PARSE,
    "decode_request": PARSE,
    "encode_output": SERIALIZE,
    "encode_response": SERIALIZE,
}
_inside = local()


def time_codecs() -> None:
    """Time the codecs that are registered, and those that will be."""
    registry = base._codec_registry
    for codec in [*registry._input_codecs.values(), *registry._request_codecs.values()]:
        _time_codec(codec)
    _time_codec(SignatureCodec)
    for name in ("register_input_codec", "register_request_codec"):
        wrap(base._CodecRegistry, name, _registering)


def _registering(register: Callable[..., Any]) -> Callable[..., Any]:
    def register_timed(self: Any, content_type: str, codec: Any) -> None:
        _time_codec(codec)
        register(self, content_type, codec)

    return register_timed


def _time_codec(codec: Any) -> None:
    kind = codec if isinstance(codec, type) else type(codec)
    for owner in kind.__mro__:
        for name, code in _METHODS.items():
            _time(owner, name, code)


def _time(owner: type, name: str, code: int) -> None:
    found = vars(owner).get(name)
    function = found.__func__ if isinstance(found, classmethod) else found
    if not callable(function) or hasattr(function, PATCHED):
        return
    timed = wraps(function)(_timed(function, code))
    setattr(timed, PATCHED, function)
    setattr(owner, name, classmethod(timed) if isinstance(found, classmethod) else timed)


def _timed(function: Callable[..., Any], code: int) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if getattr(_inside, "codec", False):
            return function(*args, **kwargs)
        _inside.codec = True
        try:
            with stage.of_code(code):
                return function(*args, **kwargs)
        finally:
            _inside.codec = False

    return marked(run, code)


INFERENCE = CODES["inference"]


def initialising(init: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the making of a model: its class is timed from then on, whatever class that is."""

    def init_timed(self: Any, *args: Any, **kwargs: Any) -> None:
        with guarded():
            _time_predict(type(self))
            if "predict_stream" in vars(type(self)):
                wrap(type(self), "predict_stream", stage.of_code(INFERENCE))
        init(self, *args, **kwargs)

    return init_timed


def _time_predict(model: Any) -> None:
    wrap(model, "predict", _predicting)
    # MLServer unwraps `predict` as far as it goes, to find the model that it is bound to: ours
    # is a function of the class like the one inside, which is none.
    vars(model.predict).pop("__wrapped__", None)


def _predicting(predict: Callable[..., Any]) -> Callable[..., Any]:
    async def predict_timed(self: Any, *args: Any, **kwargs: Any) -> Any:
        formed = take(args[0]) if args else None
        if formed is None:
            with stage.of_code(INFERENCE):
                return await predict(self, *args, **kwargs)
        with formed, working_for(formed), formed.inference():
            return await predict(self, *args, **kwargs)

    return marked(predict_timed, INFERENCE)


# MLServer's pool: the timelines of a message go with it, as one more attribute of plain text.
#
# The server charges `inference` from sending to receiving; the worker writes into the same records
# how long the message lay in the `queue`, and what its model did. A worker without stagescope
# passes the attribute over.


CARRIERS = "stagescope"
QUEUE = CODES["queue"]


def sending(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the sending of a message to a worker."""

    async def lend_and_dispatch(self: Any, message: Any) -> Any:
        with guarded():
            message.__dict__[CARRIERS] = lend_present()
        return await dispatch(self, message)

    return lend_and_dispatch


def lend_present() -> list[str]:
    """Lend the timeline that the present code works for; all of them where it is a batch's."""
    present = current.get()
    timelines = present.timelines if isinstance(present, TimelineGroup) else (present,)
    carriers = [_lend(timeline) for timeline in timelines if timeline is not None]
    return [carrier for carrier in carriers if carrier]


def _lend(timeline: Timeline) -> str | None:
    token = current.set(timeline)
    try:
        return inject()
    finally:
        current.reset(token)


def receiving(process: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap the processing of a message in the worker."""

    async def attach_and_process(self: Any, message: Any) -> Any:
        attached: list[AttachedTimeline] = []
        with guarded():
            attached = _attach(vars(message).pop(CARRIERS, ()))
        if not attached:
            return await process(self, message)
        token = current.set(attached[0] if len(attached) == 1 else TimelineGroup(attached))
        try:
            return await process(self, message)
        finally:
            current.reset(token)
            for timeline in attached:
                timeline.done = True

    return attach_and_process


def _attach(carriers: list[str]) -> list[AttachedTimeline]:
    recorder = wrapping.recorder() if carriers else None
    if recorder is None:
        return []
    attached = [one for carrier in carriers if (one := extract(carrier, recorder))]
    for timeline in attached:
        timeline.close_at(timeline.open_at(QUEUE, timeline.lent_ns), timeline.clock())
    return attached


def _install() -> None:
    if disabled():
        return
    wrap(FastAPI, "__call__", calling)
    wrap(mlserver.rest.server, "create_app", creating)
    wrap(Request, "json", parsed)
    wrap(Response, "render", rendered)
    wrap(MLModel, "__init__", initialising)
    wrap(AdaptiveBatcher, "predict", queueing)
    wrap(AdaptiveBatcher, "_batch_requests", forming)
    wrap(BatchedRequests, "_merge_requests", merging)
    wrap(Dispatcher, "dispatch_request", sending)
    wrap(Worker, "_process_request", receiving)
    time_codecs()


HOOK = Hook("mlserver", "mlserver", ("1.6", "2"), _install)
