"""Streams behind a real uvicorn: what their generators do is never `respond`, and never lost.

Each generator measures its own work; what the record says is held against that.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.routing import Route

from stagescope import stage
from stagescope.face import StageMiddleware
from stagescope.middleware.types import ASGIApp, Receive, Scope, Send
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.spool import Spool
from tests.support.serving import exchange, served

GET = b"GET /tokens HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
STEPS_S = (0.05, *[0.005] * 24)
"""A prefill and decode steps, more than the sendings that are timed apart."""


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No agent beside the public middleware; what our guard would swallow fails the test."""
    monkeypatch.setenv("STAGESCOPE_AGENT", "off")
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@dataclass
class Model:
    """What makes the tokens, and how long it worked for them by its own clock."""

    marks: bool
    work_ns: dict[str, int] = field(default_factory=dict)

    def _steps(self) -> Iterator[tuple[str, float]]:
        for number, pause_s in enumerate(STEPS_S):
            yield "inference.decode" if number else "inference.prefill", pause_s

    def _mark(self, name: str) -> Any:
        return stage(name) if self.marks else nullcontext()

    def _worked(self, name: str, since_ns: int) -> None:
        self.work_ns[name] = self.work_ns.get(name, 0) + time.monotonic_ns() - since_ns

    async def tokens(self) -> AsyncIterator[str]:
        """Make tokens on the event loop."""
        for name, pause_s in self._steps():
            with self._mark(name):
                since_ns = time.monotonic_ns()
                await asyncio.sleep(pause_s)
                self._worked(name, since_ns)
            yield "token"

    def blocking_tokens(self) -> Iterator[str]:
        """Make tokens on a worker thread."""
        for name, pause_s in self._steps():
            with self._mark(name):
                since_ns = time.monotonic_ns()
                time.sleep(pause_s)
                self._worked(name, since_ns)
            yield "token"


def fastapi_app(model: Model) -> FastAPI:
    """An endpoint that answers with a generator."""
    app = FastAPI()

    @app.get("/tokens")
    async def tokens() -> StreamingResponse:
        return StreamingResponse(model.tokens())

    return app


def fastapi_blocking_app(model: Model) -> FastAPI:
    """A `def` endpoint that answers with a `def` generator."""
    app = FastAPI()

    @app.get("/tokens")
    def tokens() -> StreamingResponse:
        return StreamingResponse(model.blocking_tokens())

    return app


def fastapi_generator_app(model: Model) -> FastAPI:
    """An endpoint that is a generator itself."""
    app = FastAPI()

    @app.get("/tokens", response_class=StreamingResponse)
    async def tokens() -> AsyncIterator[str]:
        async for token in model.tokens():
            yield token

    return app


def starlette_app(model: Model) -> Starlette:
    """The same without FastAPI."""

    async def tokens(request: Request) -> StreamingResponse:
        return StreamingResponse(model.tokens())

    return Starlette(routes=[Route("/tokens", tokens)])


def sse_app(model: Model) -> FastAPI:
    """Server-sent events by sse-starlette, as most servers of language models send them."""
    app = FastAPI()

    @app.get("/tokens")
    async def tokens() -> EventSourceResponse:
        return EventSourceResponse(model.tokens())

    return app


def raw_app(model: Model) -> ASGIApp:
    """An ASGI app that sends by itself."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        async for token in model.tokens():
            body = token.encode()
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await send({"type": "http.response.body", "body": b""})

    return app


class Passing(BaseHTTPMiddleware):
    """As `@app.middleware("http")`: the app runs in a task of its own, behind a queue."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        """Hand on."""
        return await call_next(request)


class Rewrapping(BaseHTTPMiddleware):
    """One that answers with a response of its own, of the same chunks."""

    async def dispatch(self, request: Request, call_next: Any) -> Any:
        """Hand on, chunk by chunk."""
        response = await call_next(request)
        return StreamingResponse(response.body_iterator, response.status_code)


class InTurn:
    """Pure ASGI middleware."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Hand on."""

        async def sent(message: Any) -> None:
            await send(message)

        await self.app(scope, receive, sent)


MAKERS: list[Callable[[Model], ASGIApp]] = [
    fastapi_app,
    fastapi_blocking_app,
    fastapi_generator_app,
    starlette_app,
    sse_app,
    raw_app,
]
BETWEEN: list[Callable[[ASGIApp], ASGIApp]] = [InTurn, Passing, Rewrapping]


def streamed(app: ASGIApp, spool: Path) -> RequestRecord:
    """Serve *app*, take its stream, and return the record."""
    with served(StageMiddleware(app, spool=spool)) as port:
        assert exchange(port, GET, timeout_s=60).count(b"token") == len(STEPS_S)
    reader = Spool(spool)
    try:
        (record,) = wait_until(
            lambda: [r for r in reader.records() if isinstance(r, RequestRecord)]
        )
    finally:
        reader.close()
    assert sum(record.self_ns().values()) == record.duration_ns
    assert record.stages_dropped == 0
    assert (record.status, record.error) == (200, "")
    return record


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("make", MAKERS)
def test_marks_in_a_generator_get_all_of_its_time(
    tmp_path: Path, make: Callable[[Model], ASGIApp], between: Callable[[ASGIApp], ASGIApp]
) -> None:
    """Prefill and decode steps are what the generator measured, whatever hands its chunks on."""
    model = Model(marks=True)

    spent = streamed(between(make(model)), tmp_path).self_ns()

    # Who waits for a disconnect reads the empty body first, beside the generator; and where no hook
    # times the sending near the app, a step may begin while the chunk before it is being sent.
    alongside = spent.get("preprocess.read", 0)
    if make is raw_app:
        alongside += spent["respond.first_byte"] + spent["respond.stream"]
    assert spent["inference.prefill"] + alongside >= model.work_ns["inference.prefill"]
    assert spent["inference.decode"] + alongside >= model.work_ns["inference.decode"]


@pytest.mark.parametrize("between", BETWEEN)
@pytest.mark.parametrize("make", MAKERS)
def test_a_generator_without_marks_is_the_endpoints_work(
    tmp_path: Path, make: Callable[[Model], ASGIApp], between: Callable[[ASGIApp], ASGIApp]
) -> None:
    """It is `endpoint` where a hook knows the framework, else `other`; `respond` is none of it."""
    model = Model(marks=False)

    record = streamed(between(make(model)), tmp_path)

    spent = record.self_ns()
    own = spent.get("endpoint", 0) + spent.get("preprocess.read", 0)
    if make is raw_app:  # As above; and a response around it begins a little after its generator.
        own += spent["other"] + spent["respond.first_byte"] + spent["respond.stream"]
    assert own >= sum(model.work_ns.values())
    assert not [span for span in record.stages if span.open]


def test_a_stage_around_the_sending_pays_for_its_own_work_alone(tmp_path: Path) -> None:
    """A mark that is open while chunks go out is charged what lies between the sendings."""
    slept: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        with stage("inference"):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            for _ in STEPS_S:
                since_ns = time.monotonic_ns()
                await asyncio.sleep(0.005)
                slept.append(time.monotonic_ns() - since_ns)
                await send({"type": "http.response.body", "body": b"token", "more_body": True})
            await send({"type": "http.response.body", "body": b""})

    record = streamed(app, tmp_path)

    assert record.self_ns()["inference"] >= sum(slept)
    sendings = [span for span in record.stages if span.stage.startswith("respond")]
    # A busy machine makes sendings slow, and slow ones are kept beyond the sixteenth.
    assert len(sendings) >= 16
    assert sum(span.end_ns - span.start_ns for span in sendings) <= record.duration_ns - sum(slept)


@pytest.mark.parametrize("more", [False, True])
def test_what_is_done_between_head_and_body_is_not_respond(tmp_path: Path, more: bool) -> None:
    """An app that sends the head first and then works gets its time in its own stage."""
    slept: list[int] = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        since_ns = time.monotonic_ns()
        await asyncio.sleep(0.1)
        slept.append(time.monotonic_ns() - since_ns)
        body = b"token" * len(STEPS_S)
        await send({"type": "http.response.body", "body": body, "more_body": more})
        if more:
            await send({"type": "http.response.body", "body": b""})

    record = streamed(app, tmp_path)

    assert record.self_ns()["other"] >= slept[0]


def test_a_response_of_one_body_has_one_sending(tmp_path: Path) -> None:
    """Head and body that follow each other at once are one entry of `respond`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        assert scope["type"] == "http"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"token" * len(STEPS_S)})

    def sendings(number: int) -> int:
        record = streamed(app, tmp_path / f"{number}")
        return sum(span.stage == "respond" for span in record.stages)

    # Between the two the machine may have been busy with something else, but not each time.
    assert 1 in [sendings(number) for number in range(5)]
