"""FastAPI behind a real uvicorn: each request has its own right stages, without any stage marked."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import anyio.to_thread
import pytest
from fastapi import APIRouter, Depends, FastAPI, Form
from fastapi.responses import PlainTextResponse, StreamingResponse
from pydantic import BaseModel, field_serializer
from starlette.applications import Starlette
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from stagescope import stage
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.hooks.hook import install_loaded
from stagescope.middleware.hooks.installer import WEB_FRAMEWORKS
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording
from tests.support.serving import served

MS = 1_000_000
SLACK_NS = 2_000 * MS
"""What a busy machine may add; what is held is that nothing is less, or on another's trace."""


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A recorder, with the hooks in place."""
    install_loaded(WEB_FRAMEWORKS)
    recording = Recording(tmp_path, in_flight_slots=64)
    yield recording
    recording.close()


def call(
    app: Any, recording: Recording, requests: Sequence[tuple[str, str, dict[str, Any]]]
) -> dict[str, tuple[int, RequestRecord]]:
    """Send all *requests* (method, path, options) at once; give status and record by trace id."""

    async def one(
        session: aiohttp.ClientSession, port: int, request: tuple[str, str, dict[str, Any]]
    ) -> tuple[str, int]:
        method, path, options = request
        trace = options.pop("trace", None) or os.urandom(16).hex()
        headers = {"traceparent": f"00-{trace}-{'1' * 16}-01", **options.pop("headers", {})}
        url = f"http://127.0.0.1:{port}{path}"
        async with session.request(method, url, headers=headers, **options) as response:
            await response.read()
            return trace, response.status

    async def all_of_them(port: int) -> list[tuple[str, int]]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            return await asyncio.gather(*(one(session, port, request) for request in requests))

    with served(StageMiddleware.around(app, recording.recorder)) as port:
        answers = asyncio.run(all_of_them(port))
    wait_until(lambda: len(recording.requests) >= len(requests))
    records = {record.trace_id: record for record in recording.requests}
    assert len(records) == len(recording.requests)
    for record in records.values():
        assert sum(record.self_ns().values()) == record.duration_ns
    return {trace: (status, records[trace]) for trace, status in answers}


def one_record(app: Any, recording: Recording, *request: Any, **options: Any) -> RequestRecord:
    """Send one request and give its record."""
    method, path = request
    ((_, record),) = call(app, recording, [(method, path, options)]).values()
    return record


def order(record: RequestRecord) -> list[str]:
    """Return the stages in order, each once where several of one name follow each other."""
    return [name for name, _ in itertools.groupby(span.stage for span in record.stages)]


class Question(BaseModel):
    """A body."""

    text: str


class Answer(BaseModel):
    """A response model that takes its time to be written."""

    text: str

    @field_serializer("text")
    def slowly(self, text: str) -> str:
        time.sleep(0.03)
        return text


def test_concurrent_requests_have_their_own_stages(recording: Recording) -> None:
    """Dependencies, endpoint and stages within last as each request asked, on its own trace."""
    app = FastAPI()

    async def checked(parse: float) -> None:
        await asyncio.sleep(parse)

    @app.get("/infer", dependencies=[Depends(checked)])
    async def infer(own: float, model: float) -> dict[str, str]:
        await asyncio.sleep(own)
        with stage("inference"):
            await asyncio.sleep(model)
        return {}

    wanted = {
        os.urandom(16).hex(): (parse, own, model)
        for parse in (0.0, 0.09)
        for own in (0.01, 0.12)
        for model in (0.03, 0.06, 0.15)
    }
    requests = [
        ("GET", f"/infer?parse={parse}&own={own}&model={model}", {"trace": trace})
        for trace, (parse, own, model) in wanted.items()
    ]

    found = call(app, recording, requests)

    for trace, (parse, own, model) in wanted.items():
        status, record = found[trace]
        assert status == 200
        assert record.route == "/infer"
        spent = record.self_ns()
        for name, asked_s in (
            ("preprocess.parse", parse), ("endpoint", own), ("inference", model)
        ):  # fmt: skip
            # asyncio's timer may fire one tick of its clock early.
            assert -1 * MS <= spent[name] - asked_s * 1e9 < SLACK_NS, (name, asked_s, spent)
        assert order(record) == [
            "preprocess.parse", "endpoint", "inference", "postprocess.serialize", "respond",
        ]  # fmt: skip


class OneThread:
    """Lets the app have a single worker thread, in the loop that serves it."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Set the limit, then serve."""
        anyio.to_thread.current_default_thread_limiter().total_tokens = 1
        await self.app(scope, receive, send)


def test_waiting_for_a_thread_is_apart_from_running(recording: Recording) -> None:
    """With one thread for four requests each waits until the one before it is done."""
    app = FastAPI()

    @app.get("/blocking")
    def blocking() -> dict[str, str]:
        with stage("inference"):
            time.sleep(0.05)
        return {}

    found = call(OneThread(app), recording, [("GET", "/blocking", {}) for _ in range(4)])

    turns = sorted(
        (record.start_ns + run.start_ns, record.start_ns + run.end_ns, record)
        for _, record in found.values()
        for run in record.stages
        if run.stage == "inference"
    )
    assert len(turns) == 4
    for (_, before_ended, _), (started, _, record) in itertools.pairwise(turns):
        assert started >= before_ended
        # The first of two: the answer of a `def` endpoint is validated in a thread as well.
        wait = next(s for s in record.stages if s.stage == "queue.threadpool")
        assert before_ended <= record.start_ns + wait.end_ns <= started
        assert record.self_ns()["inference"] >= 50 * MS


def test_a_body_is_parsed_and_a_model_serialized(recording: Recording) -> None:
    """Reading, decoding and validation are preprocess; the response model is postprocess."""
    app = FastAPI()

    @app.post("/ask/{number}")
    async def ask(number: int, question: Question) -> Answer:
        return Answer(text=question.text)

    record = one_record(app, recording, "POST", "/ask/7", json={"text": "x"})

    spent = record.self_ns()
    assert spent["postprocess.serialize"] >= 30 * MS
    assert order(record) == [
        "preprocess.read", "preprocess.parse", "endpoint",
        "postprocess.serialize", "respond",
    ]  # fmt: skip
    assert record.route == "/ask/{number}"


def test_what_validation_refuses_ends_in_parse(recording: Recording) -> None:
    """A body that does not fit never reaches the endpoint, and the 422 is rendered as JSON."""
    app = FastAPI()

    @app.post("/ask")
    async def ask(question: Question) -> None:
        raise AssertionError

    found = call(app, recording, [("POST", "/ask", {"json": {"text": 1}})])

    ((status, record),) = found.values()
    assert status == 422
    names = [s.stage for s in record.stages]
    assert "endpoint" not in names
    assert names[-2:] == ["postprocess.serialize", "respond"]


def test_a_form_is_parsed(recording: Recording) -> None:
    """A form body is charged to `preprocess`, its reading to `preprocess.read`."""
    app = FastAPI()

    @app.post("/form")
    async def form(text: Annotated[str, Form()]) -> str:
        return text

    record = one_record(app, recording, "POST", "/form", data={"text": "x"})

    assert record.status == 200
    assert {"preprocess.read", "preprocess.parse"} <= {s.stage for s in record.stages}


def test_an_endpoint_that_raises_is_failed(recording: Recording) -> None:
    """The endpoint's stage is marked failed, and the error stays the user's."""
    app = FastAPI()

    @app.get("/boom")
    async def boom() -> None:
        raise LookupError

    record = one_record(app, recording, "GET", "/boom")

    assert (record.status, record.error) == (500, "LookupError")
    assert [s.stage for s in record.stages if s.failed] == ["endpoint"]


def test_a_long_stream_from_a_thread_does_not_fill_the_record(recording: Recording) -> None:
    """Each chunk of a `def` generator takes a thread; only the first waits get entries."""
    app = FastAPI()

    @app.get("/stream")
    def stream() -> StreamingResponse:
        return StreamingResponse(str(number) for number in range(300))

    record = one_record(app, recording, "GET", "/stream")

    assert record.chunks == 301
    assert record.stages_dropped == 0
    short = [
        s for s in record.stages if s.stage == "queue.threadpool" and s.end_ns - s.start_ns < MS
    ]
    assert len(short) <= 16
    assert {"respond.first_byte", "respond.stream"} <= {s.stage for s in record.stages}


@pytest.mark.parametrize(
    ("path", "route"),
    [
        ("/v1/models/m/infer", "/v1/models/{name}/infer"),
        ("/tenants/9/inner/5", "/tenants/{tenant}/inner/{number}"),
        ("/tenants/9/inner/none/such", ""),
        ("/nowhere", ""),
    ],
)
def test_the_route_is_a_template(recording: Recording, path: str, route: str) -> None:
    """Prefixes of routers and mounted apps are in it, values are not."""
    app, router, inner = FastAPI(), APIRouter(prefix="/models"), FastAPI()

    @router.get("/{name}/infer")
    async def infer(name: str) -> None: ...

    @inner.get("/inner/{number:int}")
    async def within(number: int) -> None: ...

    app.include_router(router, prefix="/v1")
    app.mount("/tenants/{tenant}", inner)

    record = one_record(app, recording, "GET", path)

    assert record.route == route or (
        record.status == 404 and record.route == "/tenants/{tenant}/{path}"
    )


@pytest.mark.parametrize("outer", [FastAPI, Starlette])
@pytest.mark.parametrize("between", [None, FastAPI, Starlette])
@pytest.mark.parametrize("path", ["/static/file.txt", "/static/none"])
def test_the_route_of_a_mounted_app_without_routes_is_its_mount(
    recording: Recording,
    tmp_path: Path,
    outer: type[Starlette],
    between: type[Starlette] | None,
    path: str,
) -> None:
    """Static files and other plain ASGI apps, whoever mounts them."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "file.txt").write_text("here")
    app = outer()
    mounting = app
    if between is not None:
        mounting = between()
        app.mount("/v1", mounting)
        path = f"/v1{path}"
    mounting.mount("/static", StaticFiles(directory=files))

    record = one_record(app, recording, "GET", path)

    assert record.route == ("/v1/static/{path}" if between else "/static/{path}")


@pytest.mark.parametrize("outer", [FastAPI, Starlette])
def test_the_route_of_a_mounted_function_is_its_mount(
    recording: Recording, outer: type[Starlette]
) -> None:
    """As prometheus_client's `/metrics` and MCP servers are mounted."""

    async def metrics(scope: Scope, receive: Receive, send: Send) -> None:
        await PlainTextResponse("up 1")(scope, receive, send)

    app = outer()
    app.mount("/metrics", metrics)

    assert one_record(app, recording, "GET", "/metrics/").route == "/metrics/{path}"


@pytest.mark.parametrize("form", ["t={:.6f}", "{:.6f}", "ms", "us"])
def test_a_proxys_stamp_begins_the_timeline(recording: Recording, form: str) -> None:
    """The time since `X-Request-Start` is `queue.ingress`, in each of its forms."""
    app = FastAPI()

    @app.get("/")
    async def root() -> None: ...

    stamp_s = time.time() - 0.2
    stamp = {"ms": f"{stamp_s * 1e3:.0f}", "us": f"t={stamp_s * 1e6:.0f}"}.get(
        form, form.format(stamp_s)
    )
    record = one_record(app, recording, "GET", "/", headers={"X-Request-Start": stamp})

    first = record.stages[0]
    assert (first.stage, first.start_ns) == ("queue.ingress", 0)
    assert 199 * MS <= first.self_ns < 200 * MS + SLACK_NS
    assert record.duration_ns >= first.self_ns
