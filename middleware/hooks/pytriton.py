"""Triton through pytriton: each request of a batch by its own trace, in the Python process.

Triton's server is C++ in a process of its own; it forms the batches and hands them over. We see
them from then on. Its headers arrive as request parameters where Triton is told to forward them,
which the hook sees to.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePath
from typing import Any

from stagescope import settings
from stagescope.identity import TraceParent, parse_run, parse_traceparent
from stagescope.middleware.asgi import SERVICE_VARIABLE
from stagescope.middleware.batch import Ticket, batch
from stagescope.middleware.hooks.hook import Hook
from stagescope.middleware.patching import wrap
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.middleware.stage import marked
from stagescope.recorder import format as fmt

HEADERS = ("traceparent", "baggage")

_PARSE = CODES["preprocess.parse"]
_SERIALIZE = CODES["postprocess.serialize"]
_RESPOND = CODES["respond"]


class Received:
    """What one call of Triton's brought: one request, or a batch that Triton has made."""

    def __init__(self, recorder: Recorder, model: str) -> None:
        self.recorder = recorder
        self.model = model
        self.failure: type[BaseException] | None = None
        self.arrived_ns = recorder.clock()
        self._timelines: list[Timeline] = []
        self._tickets: list[Ticket] = []
        self._sending: list[int] = []

    def read(self, parameters: Sequence[Mapping[str, object] | None]) -> None:
        """Begin the requests' timelines, now that their tensors and *parameters* are read."""
        now_ns = self.recorder.clock()
        path = f"/v2/models/{self.model}/infer".encode()
        for given in parameters:
            timeline = _timeline(self.recorder, self.arrived_ns, headers_in(given or {}), path)
            timeline.close_at(timeline.open_at(_PARSE, self.arrived_ns), now_ns)
            self._timelines.append(timeline)
            self._tickets.append(Ticket(timeline, now_ns))

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """Be inside the user's function: a batch, and stages that are every member's."""
        timelines = self._timelines
        if not timelines:
            yield
            return
        token = current.set(timelines[0] if len(timelines) == 1 else TimelineGroup(timelines))
        try:
            with batch(self.model) as formed:
                formed.add(*self._tickets)
                with formed.inference():
                    yield
                    if self.failure is not None:  # Caught inside, and sent as the answer.
                        formed.fail(self.failure)
        finally:
            current.reset(token)

    @contextmanager
    def serializing(self) -> Iterator[None]:
        """Be making bytes of an answer; what comes after it is handing it over."""
        opened: list[int] = []
        with guarded(self.recorder):
            self._end_sending()
            opened = [timeline.open(_SERIALIZE) for timeline in self._timelines]
        try:
            yield
        finally:
            with guarded(self.recorder):
                for timeline, index in zip(self._timelines, opened, strict=False):
                    timeline.close(index)
                    self._sending.append(timeline.open(_RESPOND))

    def finish(self) -> None:
        """End all of them: the last answer was handed to Triton, or an error was."""
        self._end_sending()
        end_ns = self.recorder.clock()
        status, error = (
            (200, b"") if self.failure is None else (500, self.failure.__name__.encode())
        )
        for timeline in self._timelines:
            timeline.finish(end_ns, 0, 0, 0, 0, 0, status, error, b"")

    def _end_sending(self) -> None:
        for timeline, index in zip(self._timelines, self._sending, strict=False):
            timeline.close(index)
        self._sending.clear()


def headers_in(parameters: Mapping[str, object]) -> dict[str, bytes]:
    """Find the forwarded headers, however they are written (`Traceparent`)."""
    return {
        name.lower(): value.encode("latin-1", "replace")
        for name, value in parameters.items()
        if name.lower() in HEADERS and isinstance(value, str)
    }


def _timeline(
    recorder: Recorder, start_ns: int, headers: Mapping[str, bytes], path: bytes
) -> Timeline:
    bits = recorder.random_bits
    if start_ns >= recorder.upkeep_due_ns:
        recorder.upkeep(start_ns)
    parent: TraceParent = (bits(128) or 1).to_bytes(16, "big"), b"", True
    parent = parse_traceparent(headers.get("traceparent", b"")) or parent
    trace_id, parent_id, sampled = parent
    return Timeline(
        recorder, fmt.KIND_REQUEST, start_ns, trace_id, (bits(64) or 1).to_bytes(8, "big"),
        parent_id, parse_run(headers.get("baggage", b"")), b"POST", path,
        fmt.FLAG_SAMPLED if sampled else 0,
    )  # fmt: skip


SERVICE = "pytriton"
"""The service's name where `OTEL_SERVICE_NAME` gives none."""

FORWARDED = f"(?i:{'|'.join(HEADERS)})"
"""Which headers Triton is to forward, in the syntax of RE2, which is here also Python's."""

_RECEIVED = "stagescope"
_MODEL = "_stagescope_model"
_SOCKET = re.compile(r"(.+)_\d+_\d+-server\.sock")


def install() -> None:
    """Wrap the way of requests from Triton to the user's function and back."""
    from pytriton.proxy.inference import (  # pyright: ignore[reportMissingImports]
        InferenceHandler,
        RequestsResponsesConnector,
    )
    from pytriton.triton import Triton  # pyright: ignore[reportMissingImports]

    wrap(Triton, "__init__", _forwarding_init)
    wrap(RequestsResponsesConnector, "__init__", _named_init)
    wrap(RequestsResponsesConnector, "handle_requests", _timed_requests)
    wrap(RequestsResponsesConnector, "preprocess", _timed_read)
    wrap(RequestsResponsesConnector, "postprocess", _timed_serialize)
    wrap(RequestsResponsesConnector, "send", _noting_errors)
    wrap(InferenceHandler, "_handle_requests", _timed_inference)


def forwarding(pattern: str | None) -> str:
    """Return *pattern* so that it lets the headers through that a trace needs."""
    if not pattern:
        return FORWARDED
    passes = re.compile(pattern).search
    names = [name for header in HEADERS for name in (header, header.capitalize())]
    return pattern if all(passes(name) for name in names) else f"({pattern})|{FORWARDED}"


def _forwarding_init(init: Callable[..., None]) -> Callable[..., None]:
    def forward(self: Any, *, config: Any = None, **kwargs: Any) -> None:
        with guarded():
            config = _forwarding_config(config)
        init(self, config=config, **kwargs)

    return forward


def _forwarding_config(config: Any) -> Any:
    from pytriton.triton import TritonConfig  # pyright: ignore[reportMissingImports]

    config, outside = config or TritonConfig(), TritonConfig.from_env()
    names = ("http_header_forward_pattern", "grpc_header_forward_pattern")
    patterns = {name: forwarding(getattr(config, name) or getattr(outside, name)) for name in names}
    return dataclasses.replace(config, **patterns)


def _named_init(init: Callable[..., None]) -> Callable[..., None]:
    def named(self: Any, url: str, *args: Any, **kwargs: Any) -> None:
        init(self, url, *args, **kwargs)
        with guarded():
            found = _SOCKET.fullmatch(PurePath(url).name)
            setattr(self, _MODEL, found[1] if found else "")

    return named


def _timed_requests(handle: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def timed(self: Any, scope: Any, payload: bytes, send: Any) -> None:
        received: Received | None = None
        with guarded():
            if recorder := _recorder():
                received = scope[_RECEIVED] = Received(recorder, getattr(self, _MODEL, ""))
        try:
            await handle(self, scope, payload, send)
        finally:
            if received is not None:
                with guarded(received.recorder):
                    received.finish()

    return timed


def _recorder() -> Recorder | None:
    if settings.DISABLE.on():
        return None
    return process_recorder(None, os.environ.get(SERVICE_VARIABLE) or SERVICE)


def _timed_read(read: Callable[..., Any]) -> Callable[..., Any]:
    def timed(self: Any, scope: Any, payload: bytes) -> Any:
        requests = read(self, scope, payload)
        received: Received | None = scope.get(_RECEIVED)
        if received is not None:
            with guarded(received.recorder):
                received.read([request.parameters for request in requests])
        return requests

    return timed


def _timed_inference(handle: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def timed(self: Any, scope: Any, requests: Any) -> None:
        received: Received | None = scope.get(_RECEIVED)
        if received is None:
            await handle(self, scope, requests)
            return
        with received.in_the_model():
            await handle(self, scope, requests)

    return marked(timed, "inference")


def _noting_errors(send: Callable[..., None]) -> Callable[..., None]:
    def noting(self: Any, scope: Any, flags: Any, responses: Any) -> None:
        received: Received | None = scope.get(_RECEIVED)
        if received is not None and isinstance(responses, BaseException):
            received.failure = type(responses)
        send(self, scope, flags, responses)

    return noting


def _timed_serialize(serialize: Callable[..., bytes]) -> Callable[..., bytes]:
    def timed(self: Any, scope: Any, responses: Any) -> bytes:
        received: Received | None = scope.get(_RECEIVED)
        if received is None or responses is None:  # None ends a stream: there is nothing in it.
            return serialize(self, scope, responses)
        with received.serializing():
            return serialize(self, scope, responses)

    return marked(timed, "postprocess.serialize")


HOOK = Hook("pytriton", "nvidia-pytriton", ("0.7", "0.8"), install)
