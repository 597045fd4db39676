"""Triton through pytriton: each request of a batch by its own trace, in the Python process.

Triton's server is C++ in a process of its own; it forms the batches and hands them over. We see
them from then on. Its headers arrive as request parameters where Triton is told to forward them,
which the hook sees to.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Awaitable, Callable
from pathlib import PurePath
from typing import Any

from stagescope.middleware.asgi import DISABLE_VARIABLE, SERVICE_VARIABLE
from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks.hook import Hook, wrap
from stagescope.middleware.hooks.pytriton_requests import HEADERS, Received
from stagescope.middleware.marks import marked
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recorder import Recorder

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
    """Give *pattern* so that it lets the headers through that a trace needs."""
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
        found = _SOCKET.fullmatch(PurePath(url).name)
        setattr(self, _MODEL, found[1] if found else "")

    return named


def _timed_requests(handle: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    async def timed(self: Any, scope: Any, payload: bytes, send: Any) -> None:
        recorder = _recorder()
        if recorder is None:
            await handle(self, scope, payload, send)
            return
        received = scope[_RECEIVED] = Received(recorder, getattr(self, _MODEL, ""))
        try:
            await handle(self, scope, payload, send)
        finally:
            with guarded(recorder):
                received.finish()

    return timed


def _recorder() -> Recorder | None:
    if os.environ.get(DISABLE_VARIABLE, "") not in ("", "0"):
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
