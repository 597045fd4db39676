"""A wrapped app behaves as the bare one does: same bytes, same errors, same order of events."""

import asyncio
import hashlib
import logging
import re
import socket
from collections.abc import AsyncIterator, Callable, Generator, Iterator, MutableMapping
from contextlib import ExitStack, asynccontextmanager, closing
from contextvars import copy_context
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import websockets
import websockets.sync.client
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket

from stagescope.agent.store.runs import RunStore
from stagescope.middleware.asgi import SCOPE_KEY, StageMiddleware
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording
from tests.support.serving import exchange, served

Log = list[str]
MEBIBYTE = 1 << 20


@pytest.fixture(autouse=True)
def _our_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our guard would swallow fails the test."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A small recorder file."""
    with closing(Recording(tmp_path)) as found:
        yield found


def make_app(log: Log) -> Starlette:
    """Make an app with one endpoint for each thing that could be disturbed; it notes in *log*."""
    go = asyncio.Event()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[dict[str, Any]]:
        log.append("startup")
        yield {"model": "loaded"}
        log.append("shutdown")

    async def plain(request: Request) -> Response:
        return PlainTextResponse(f"{request.method} {request.url.query} {request.state.model}")

    async def empty(request: Request) -> Response:
        return Response(status_code=204)

    async def raises(request: Request) -> Response:
        raise LookupError("before the response")

    async def raises_after(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"first"
            raise LookupError("after the first chunk")

        return StreamingResponse(chunks())

    async def background(request: Request) -> Response:
        async def note() -> None:  # Not in a thread: anyio would keep it for the next one.
            log.append("background")

        return PlainTextResponse("sent", background=BackgroundTask(note))

    async def background_fails(request: Request) -> Response:
        async def fail() -> None:
            log.append("background")
            raise LookupError("in the background")

        return PlainTextResponse("sent", background=BackgroundTask(fail))

    async def big(request: Request) -> Response:
        return Response(bytes(range(256)) * (4 * MEBIBYTE // 256))

    async def echo(request: Request) -> Response:
        body = await request.body()
        return PlainTextResponse(f"{len(body)} {hashlib.sha256(body).hexdigest()}")

    async def stream(request: Request) -> Response:
        async def chunks() -> AsyncIterator[bytes]:
            yield b"one"
            await go.wait()
            yield b"two"

        return StreamingResponse(chunks())

    async def let_go(request: Request) -> Response:
        go.set()
        return Response(status_code=202)

    async def waits(request: Request) -> Response:
        log.append("waiting")
        await request.body()
        message = await request.receive()
        log.append(message["type"])
        return Response()

    async def unread(request: Request) -> Response:
        return PlainTextResponse("the body was not read")

    async def sync_error(request: Request) -> Response:
        return Response(status_code=503, headers={"retry-after": "1"})

    async def socket_echo(websocket: WebSocket) -> None:
        await websocket.accept(subprotocol="echo")
        while (text := await websocket.receive_text()) != "bye":
            await websocket.send_text(text.upper())
        await websocket.close(4321, "as asked")
        log.append("closed")

    return Starlette(
        routes=[
            Route("/plain", plain),
            Route("/empty", empty),
            Route("/raises", raises),
            Route("/raises-after", raises_after),
            Route("/background", background),
            Route("/background-fails", background_fails),
            Route("/big", big),
            Route("/echo", echo, methods=["POST"]),
            Route("/stream", stream),
            Route("/go", let_go),
            Route("/waits", waits),
            Route("/unread", unread, methods=["POST"]),
            Route("/unavailable", sync_error),
            WebSocketRoute("/socket", socket_echo),
        ],
        lifespan=lifespan,
    )


def get(target: str, *, method: str = "GET", headers: str = "", close: bool = True) -> bytes:
    """Make the bytes of a request without a body."""
    connection = "connection: close\r\n" if close else ""
    return f"{method} {target} HTTP/1.1\r\nhost: test\r\n{connection}{headers}\r\n".encode()


def post(target: str, body: bytes) -> bytes:
    """Make the bytes of a request with a body of known length."""
    return get(target, method="POST", headers=f"content-length: {len(body)}\r\n") + body


def chunked(target: str, *chunks: bytes) -> bytes:
    """Make the bytes of a request whose body comes in chunks."""
    sent = b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in chunks)
    head = get(target, method="POST", headers="transfer-encoding: chunked\r\n")
    return head + sent + b"0\r\n\r\n"


def one(request: bytes) -> Callable[[int, Log], object]:
    """Send one request and see the answer, byte for byte."""
    return lambda port, log: undated(exchange(port, request))


def undated(answer: bytes) -> bytes:
    """Return an answer without its date."""
    return re.sub(rb"date: [^\r]*\r\n", b"", answer)


def keep_alive(port: int, log: Log) -> object:
    """Send forty requests down one connection, several at once."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        answers = b""
        for turn in range(10):
            for query in range(4):
                connection.sendall(get(f"/plain?{turn}-{query}", close=False))
            while answers.count(b"loaded") < 4 * (turn + 1):
                answers += connection.recv(65536)
    return undated(answers)


def chunks_come_when_sent(port: int, log: Log) -> object:
    """See the first chunk before anybody has allowed the second."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(get("/stream"))
        answer = b""
        while b"one" not in answer:
            answer += connection.recv(65536)
        assert b"two" not in answer
        exchange(port, get("/go"))
        rest = b"".join(iter(lambda: connection.recv(65536), b""))
    return undated(answer + rest)


def client_goes(port: int, log: Log) -> object:
    """Leave while the app waits; it is told."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as connection:
        connection.sendall(get("/waits"))
        wait_until(lambda: "waiting" in log)
    wait_until(lambda: "http.disconnect" in log)
    return None


def websocket_session(port: int, log: Log) -> object:
    """Echo over a websocket until the server closes it with a code of its own."""
    address = f"ws://127.0.0.1:{port}/socket"
    with websockets.sync.client.connect(address, subprotocols=["echo"]) as connection:  # type: ignore[list-item]
        connection.send("a")
        connection.send("b")
        heard = [connection.recv(), connection.recv()]
        connection.send("bye")
        with pytest.raises(websockets.ConnectionClosed):
            connection.recv()
        wait_until(lambda: "closed" in log)
        return heard, connection.subprotocol, connection.close_code, connection.close_reason


def websocket_refused(port: int, log: Log) -> object:
    """Ask for a websocket that there is not."""
    with pytest.raises(websockets.InvalidStatus) as refused:
        websockets.sync.client.connect(f"ws://127.0.0.1:{port}/none")
    return refused.value.response.status_code


def background_runs(target: str) -> Callable[[int, Log], object]:
    """See the answer, and the background task that runs after it."""

    def act(port: int, log: Log) -> object:
        answer = undated(exchange(port, get(target)))
        wait_until(lambda: "background" in log)
        return answer

    return act


ACTS: dict[str, Callable[[int, Log], object]] = {
    "get": one(get("/plain?a=b")),
    "head": one(get("/plain", method="HEAD")),
    "204": one(get("/empty")),
    "404": one(get("/nowhere")),
    "405": one(get("/echo")),
    "503": one(get("/unavailable")),
    "http 1.0": one(b"GET /plain HTTP/1.0\r\n\r\n"),
    "exception before": one(get("/raises")),
    "exception after": one(get("/raises-after")),
    "background": background_runs("/background"),
    "background fails": background_runs("/background-fails"),
    "big answer": one(get("/big")),
    "big body": one(post("/echo", b"x" * (3 * MEBIBYTE))),
    "chunked body": one(chunked("/echo", b"a" * 70_000, b"b", b"c" * 200_000)),
    "unread body": one(post("/unread", b"x" * 10_000)),
    "expect continue": one(
        get("/echo", method="POST", headers="expect: 100-continue\r\ncontent-length: 2\r\n") + b"hi"
    ),
    "keep alive": keep_alive,
    "stream": chunks_come_when_sent,
    "disconnect": client_goes,
    "websocket": websocket_session,
    "websocket refused": websocket_refused,
}


@dataclass(frozen=True)
class Served:
    """One app behind a server."""

    port: int
    log: Log

    def observe(
        self, act: Callable[[int, Log], object], caplog: pytest.LogCaptureFixture
    ) -> tuple[object, Log, list[str]]:
        """Act on it, and give what was seen, noted and logged as an error."""
        self.log.clear()
        caplog.clear()
        with caplog.at_level(logging.ERROR):
            seen = act(self.port, self.log)
        errors = [
            f"{record.name}: {record.exc_info[0].__name__ if record.exc_info else record.message}"
            for record in caplog.records
            if record.exc_info is None or record.exc_info[0] is not None
        ]
        return seen, list(self.log), errors


@dataclass(frozen=True)
class Trio:
    """The same app three times: bare, wrapped, and with the middleware added to its stack."""

    bare: Served
    wrapped: Served
    added: Served
    recording: Recording


@pytest.fixture(scope="module", params=["h11", "httptools"])
def trio(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trio]:
    """Three servers of one protocol, for all tests of this module."""
    logs: list[Log] = [[], [], []]
    apps: list[Any] = [make_app(log) for log in logs]
    with ExitStack() as stack:
        recording = stack.enter_context(closing(Recording(tmp_path_factory.mktemp("spool"))))
        apps[1] = StageMiddleware.around(apps[1], recording.recorder)
        apps[2].add_middleware(StageMiddleware, spool=tmp_path_factory.mktemp("spool"))
        ports = [stack.enter_context(served(app, request.param)) for app in apps]
        bare, wrapped, added = map(Served, ports, logs)
        yield Trio(bare, wrapped, added, recording)


@pytest.mark.parametrize("name", ACTS)
def test_a_served_app_behaves_as_it_does_bare(
    name: str, trio: Trio, caplog: pytest.LogCaptureFixture
) -> None:
    """Bytes on the wire, the app's own notes and the server's error log are those of the bare app."""
    already = len(trio.recording.requests)
    bare = trio.bare.observe(ACTS[name], caplog)

    assert trio.wrapped.observe(ACTS[name], caplog) == bare
    assert trio.added.observe(ACTS[name], caplog) == bare
    if "websocket" not in name:
        assert wait_until(lambda: len(trio.recording.requests) > already)


def test_a_lifespan_runs_once_each_way(recording: Recording) -> None:
    """Startup comes before the first request, shutdown after the last."""
    log: Log = []
    with served(StageMiddleware.around(make_app(log), recording.recorder)) as port:
        exchange(port, get("/background"))
        wait_until(lambda: "background" in log)

    assert log == ["startup", "background", "shutdown"]


@pytest.mark.parametrize("when", ["startup", "shutdown"])
def test_a_failing_lifespan_fails_as_it_does_bare(
    when: str, recording: Recording, caplog: pytest.LogCaptureFixture
) -> None:
    """A lifespan that raises stops the server at its start, and is logged at its end."""

    def failing() -> Starlette:
        @asynccontextmanager
        async def lifespan(app: Starlette) -> AsyncIterator[None]:
            if when == "startup":
                raise LookupError("no model")
            yield
            raise LookupError("no model any more")

        return Starlette(lifespan=lifespan)

    def outcome(app: Any) -> tuple[str, list[str]]:
        caplog.clear()
        started = "started"
        try:
            with served(app):
                pass
        except AssertionError:
            started = "not started"
        return started, [record.getMessage()[-200:] for record in caplog.records]

    with caplog.at_level(logging.ERROR):
        bare = outcome(failing())
        wrapped = outcome(StageMiddleware.around(failing(), recording.recorder))

    assert wrapped == bare
    assert bare[0] == ("not started" if when == "startup" else "started")
    assert "no model" in "".join(bare[1])


def test_server_timing_answers_an_opened_load_run_alone(recording: Recording) -> None:
    """The header is sent where the request carries its baggage, beside the app's own headers."""
    RunStore(recording.path.parent / "runs").open("r-1")
    app = StageMiddleware.around(make_app([]), recording.recorder)
    with served(app) as port:
        without = exchange(port, get("/plain"))
        within = exchange(port, get("/plain", headers="baggage: a=b, stagescope.run=r-1;p=1\r\n"))
        other = exchange(port, get("/plain", headers="baggage: stagescope.runs=r-1\r\n"))
        stranger = exchange(port, get("/plain", headers="baggage: stagescope.run=guess\r\n"))

    assert b"server-timing" not in without + other + stranger
    timing = re.search(rb"server-timing: ([^\r]*)\r\n", within)
    assert timing
    assert re.fullmatch(rb"([a-z]+;dur=[0-9.]+, )*total;dur=[0-9.]+", timing[1])
    assert [record.run_id for record in recording.requests] == ["", "r-1", "", "guess"]


@pytest.mark.parametrize(("mode", "answered"), [("all", True), ("off", False)])
def test_server_timing_can_be_chosen(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, mode: str, answered: bool
) -> None:
    """`all` answers a run that nobody opened, `off` not even an opened one."""
    monkeypatch.setenv("STAGESCOPE_SERVER_TIMING", mode)
    if not answered:
        RunStore(recording.path.parent / "runs").open("r-1")
    with served(StageMiddleware.around(make_app([]), recording.recorder)) as port:
        reply = exchange(port, get("/plain", headers="baggage: stagescope.run=r-1\r\n"))
    assert (b"server-timing" in reply) == answered


# --- raw ASGI, for what no server sends --------------------------------------------------------

App = Callable[[Any, Any, Any], Any]


def http_scope(**changes: Any) -> dict[str, Any]:
    """Return a scope as a server makes it."""
    return {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET",
        "scheme": "http", "path": "/p", "raw_path": b"/p", "query_string": b"secret=1",
        "root_path": "", "headers": [(b"host", b"h")], "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 2), "state": {}, "extensions": {"http.response.pathsend": {}},
    } | changes  # fmt: skip


def drive(app: App, scope: Any) -> tuple[list[Any], str]:
    """Call *app* once; give what it sent and what it raised."""
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: Any) -> None:
        if not sent and message["type"] == "http.response.body":
            raise RuntimeError("a body before its start")
        if message["type"] == "http.response.start" and "status" not in message:
            raise KeyError("status")
        if not isinstance(message.get("status", 200), int):
            raise TypeError("a status must be a number")
        sent.append(message)

    async def call() -> str:
        try:
            await app(scope, receive, send)
        except BaseException as error:  # noqa: BLE001 - compared, whatever it is
            return repr(error)
        return ""

    raised = asyncio.run(call())
    return sent, raised


START = {"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]}


def says(*messages: Any, error: BaseException | None = None) -> App:
    """Make an app that sends *messages* and then raises *error*."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        for message in messages:
            await send(message)
        if error is not None:
            raise error

    return app


def body(data: bytes = b"x", *, more: bool = False) -> dict[str, Any]:
    """Make a message with a piece of the body."""
    return {"type": "http.response.body", "body": data, "more_body": more}


ODD_APPS: dict[str, tuple[App, str]] = {
    "never responds": (says(), "incomplete"),
    "returns in the middle": (says(START, body(more=True)), "incomplete"),
    "start alone": (says(START), "incomplete"),
    "is cancelled": (says(START, error=asyncio.CancelledError()), "CancelledError"),
    "exits": (says(error=SystemExit(3)), "SystemExit"),
    "body before start": (says(body()), "RuntimeError"),
    "chunk before start": (says(body(more=True)), "RuntimeError"),
    "no status": (says({"type": "http.response.start"}), "KeyError"),
    "status of the wrong kind": (says({**START, "status": "200"}), "TypeError"),
    "huge status": (says({**START, "status": 1 << 40}, body()), ""),
    "pathsend": (says(START, {"type": "http.response.pathsend", "path": "/f"}), ""),
    "zero copy": (says(START, {"type": "http.response.zerocopysend", "file": 3}), ""),
    "unknown message": (says(START, {"type": "http.response.new", "x": object}, body()), ""),
    "early hint": (says({"type": "http.response.early_hint", "links": []}, START, body()), ""),
    "no body key": (says(START, {"type": "http.response.body"}), ""),
    "memoryview": (says(START, body(memoryview(b"abc"))), ""),  # type: ignore[arg-type]
    "trailers": (says({**START, "trailers": True}, body(), {"type": "http.response.trailers"}), ""),
    "raises after the end": (says(START, body(), error=LookupError("late")), ""),
    "500 and raises": (says({**START, "status": 500}, body(), error=LookupError()), "LookupError"),
}


@pytest.mark.parametrize("name", ODD_APPS)
def test_an_odd_app_stays_as_odd_as_it_is(name: str, recording: Recording) -> None:
    """Messages and exceptions pass through as they are, and the record says how it ended."""
    app, error = ODD_APPS[name]
    wrapped = StageMiddleware.around(app, recording.recorder)

    assert drive(wrapped, http_scope()) == drive(app, http_scope())
    assert [record.error for record in recording.requests] == [error]


@pytest.mark.parametrize(
    ("app", "status"),
    [
        (says(error=LookupError()), 500),
        (says(START, error=LookupError()), 200),
        (says(error=asyncio.CancelledError()), 0),
        (says(), 0),
    ],
    ids=["raises", "raises after the start", "is cancelled", "returns"],
)
def test_an_exception_before_the_response_is_a_500(
    app: App, status: int, recording: Recording
) -> None:
    """The server answers for an app that raises; nothing that it does may be counted as no status."""
    drive(StageMiddleware.around(app, recording.recorder), http_scope())

    assert [record.status for record in recording.requests] == [status]


def test_a_stream_whose_empty_end_is_cancelled_is_complete(recording: Recording) -> None:
    """As under hypercorn on trio, where the stream's end cancels the task that sends it."""
    app = says(START, body(more=True), body(b""))

    async def receive() -> dict[str, Any]:
        return {"type": "http.request"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body" and not message["more_body"]:
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        asyncio.run(StageMiddleware.around(app, recording.recorder)(http_scope(), receive, send))

    assert [(record.status, record.error) for record in recording.requests] == [(200, "")]


@pytest.mark.parametrize("status", [200, 500, 503])
def test_a_record_does_not_wait_for_a_background_task(status: int, recording: Recording) -> None:
    """It is written while the task that came with the response still runs."""
    recorded = asyncio.Event()
    ended: list[bool] = []

    async def later() -> None:
        async with asyncio.timeout(20):
            await recorded.wait()
        ended.append(True)

    response = PlainTextResponse("sent", status, background=BackgroundTask(later))
    wrapped = StageMiddleware.around(response, recording.recorder)

    async def call() -> None:
        serving = asyncio.create_task(serve(wrapped))
        while not recording.requests and not serving.done():
            await asyncio.sleep(0.01)
        recorded.set()
        await serving

    async def serve(app: App) -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.request"}

        async def send(message: dict[str, Any]) -> None:
            return

        await app(http_scope(), receive, send)

    asyncio.run(call())
    assert ended == [True]
    assert [(record.status, record.error) for record in recording.requests] == [(status, "")]


SCOPES = {
    "plain": http_scope(),
    "no raw_path": {key: value for key, value in http_scope().items() if key != "raw_path"},
    "raw_path None": http_scope(raw_path=None),
    "raw_path with its query": http_scope(raw_path=b"/p?secret=1"),
    "no text": http_scope(path="/\udcff", raw_path=b"", method="\udcff"),
    "route of another framework": http_scope(route=object()),
    "route with a pattern": http_scope(route=re),
    "route's path is no text": http_scope(route=type("Route", (), {"path": 3})),
    "headers as a tuple": http_scope(headers=((b"host", b"h"),)),
}


@pytest.mark.parametrize("name", SCOPES)
def test_the_scope_arrives_as_it_was(name: str, recording: Recording) -> None:
    """The app gets the server's own scope object, with our one key added and nothing changed."""
    scope = SCOPES[name]
    before = dict(scope)
    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(scope)
        await says(START, body())(scope, receive, send)

    assert drive(StageMiddleware.around(app, recording.recorder), scope)[1] == ""
    assert seen[0] is scope
    assert {key: value for key, value in scope.items() if key != SCOPE_KEY} == before
    assert "secret" not in recording.requests[0].path
    scope.pop(SCOPE_KEY)


@pytest.mark.parametrize("kind", ["websocket", "lifespan", "something.new"])
def test_other_scopes_pass_untouched(kind: str, recording: Recording) -> None:
    """What is not HTTP reaches the app as the very objects that the server gave."""
    seen: list[Any] = []

    async def app(*given: Any) -> None:
        seen.extend(given)

    async def call() -> None:
        pass

    given = ({"type": kind}, call, call)
    asyncio.run(StageMiddleware.around(app, recording.recorder)(*given))  # type: ignore[arg-type]

    assert [id(each) for each in seen] == [id(each) for each in given]
    assert given[0] == {"type": kind}
    assert not recording.requests


def test_a_request_closed_in_another_context_is_recorded(recording: Recording) -> None:
    """A coroutine that the garbage collector closes ends without an error of ours."""

    class Waiting:
        def __await__(self) -> Generator[None, None, None]:
            yield

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await Waiting()

    wrapped: Any = StageMiddleware.around(app, recording.recorder)
    request = wrapped(http_scope(), None, None)
    copy_context().run(request.send, None)
    request.close()

    assert [record.error for record in recording.requests] == ["GeneratorExit"]


def test_wrapped_twice_is_recorded_once(recording: Recording) -> None:
    """A second middleware on the same request steps aside."""
    app = says(START, body())
    inner = StageMiddleware.around(app, recording.recorder)
    outer = StageMiddleware.around(inner, recording.recorder)

    assert drive(outer, http_scope()) == drive(app, http_scope())
    assert len(recording.requests) == 1


def test_disabled_is_not_there(recording: Recording, monkeypatch: pytest.MonkeyPatch) -> None:
    """`STAGESCOPE_DISABLE=1` passes every request on, recorded nowhere."""
    monkeypatch.setenv("STAGESCOPE_DISABLE", "1")
    app = StageMiddleware.around(says(START, body()), recording.recorder)
    scope = http_scope()

    drive(app, scope)

    assert SCOPE_KEY not in scope
    assert not recording.requests
