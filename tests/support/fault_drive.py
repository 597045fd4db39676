"""Apps of every shape, driven in process, as a server drives them; what they answered is compared.

The same apps are made with stagescope's names and with stand-ins that do nothing (`BARE`).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Self, cast

from fastapi import FastAPI, WebSocket
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from stagescope.middleware.stage import stage as Stage

PARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
MOST_S = 20.0
"""How long one request may take before it counts as hanging."""


@dataclass
class Api:
    """What an app uses of stagescope."""

    stage: type[Stage]
    carry: Any
    batch: Any


class _Nothing:
    def __init__(self, *_: object, **__: object) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __call__(self, function: Any) -> Any:
        return function

    @staticmethod
    def enqueue() -> None:
        return None

    def add(self, *_: object) -> None:
        return None

    collate = inference = __enter__


BARE = Api(cast(Any, _Nothing), lambda function: function, _Nothing)


@dataclass
class Made:
    """An app, and what its background tasks did."""

    app: Any
    done: list[str] = field(default_factory=list)


pool = ThreadPoolExecutor(1)
"""An executor of the app's own."""


def fastapi_app(api: Api, spans: Callable[[str], Any]) -> Made:
    """Make an app with an endpoint for each way to use stages; *spans* opens a span of the app's."""
    stage, batch = api.stage, api.batch
    app = FastAPI(openapi_url=None)
    made = Made(app)

    @stage("inference")
    def computed(number: int) -> int:
        return number * 2

    @stage("postprocess")
    async def written(number: int) -> str:
        await asyncio.sleep(0)
        return str(number)

    @stage("preprocess")
    def lines(count: int) -> Iterator[str]:
        for number in range(count):
            yield f"line {number}\n"

    @stage("inference.decode")
    async def tokens(count: int) -> AsyncIterator[bytes]:
        for number in range(count):
            await asyncio.sleep(0)
            yield b"%d," % number

    @app.post("/items/{number}")
    async def item(number: int, body: dict[str, int]) -> dict[str, Any]:
        with stage("preprocess"), spans("read"):
            total = sum(body.values())
        with stage(f"free.{number}"), stage("inference"):
            await asyncio.sleep(0)
        return {"total": total, "twice": computed(number), "text": await written(number)}

    @app.get("/thread")
    def thread() -> dict[str, int]:
        with stage("inference"):
            return {"thread": computed(1)}

    @app.get("/tokens")
    async def stream() -> StreamingResponse:
        return StreamingResponse(tokens(20), media_type="text/plain")

    @app.get("/lines")
    def sync_stream() -> StreamingResponse:
        return StreamingResponse(lines(20), media_type="text/plain")

    @app.get("/many")
    async def many() -> Response:
        for _ in range(90):
            with stage("preprocess.parse"):
                pass
        return Response(b"many")

    @app.get("/raises")
    async def raises() -> None:
        with stage("inference"):
            raise RuntimeError("the app's own")

    @app.get("/background")
    async def background() -> Response:
        return Response(b"soon", background=BackgroundTask(made.done.append, "background"))

    @app.get("/fails")
    async def fails() -> Response:
        return PlainTextResponse("busy", 503)

    @app.get("/carried")
    async def carried() -> Response:
        def work() -> bytes:
            with stage("inference"):
                return b"carried"

        other = await asyncio.to_thread(computed, 3)
        task = asyncio.create_task(written(4))
        carrying = asyncio.wrap_future(pool.submit(api.carry(work)))
        return Response(b"%b %d %b" % (await carrying, other, (await task).encode()))

    @app.get("/batch")
    async def batched() -> Response:
        ticket = batch.enqueue()
        with batch("model") as formed:
            formed.add(ticket, None)
            with formed.collate():
                await asyncio.sleep(0)
            with formed.inference():
                await asyncio.sleep(0)
        return Response(b"batched")

    @app.get("/batch/fails")
    async def batch_fails() -> Response:
        with batch("model") as formed:
            formed.add(batch.enqueue())
            with formed.inference():
                raise ValueError("the model's own")

    @app.websocket("/ws")
    async def ws(socket: WebSocket) -> None:
        await socket.accept()
        with stage("inference"):
            await socket.send_text((await socket.receive_text()).upper())
        await socket.close()

    @app.exception_handler(ValueError)
    async def explained(_: Any, problem: ValueError) -> JSONResponse:
        return JSONResponse({"why": str(problem)}, 422)

    async def inner(request: Any) -> Response:
        return JSONResponse({"mounted": request.path_params["name"]})

    app.mount("/m", Starlette(routes=[Mount("/n", routes=[Route("/{name}", inner)])]))
    return made


def raw_app(api: Api) -> Made:
    """Make an ASGI app without a framework."""
    made = Made(None)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            for _ in range(2):
                kind = (await receive())["type"]
                made.done.append(kind)
                await send({"type": f"{kind}.complete"})
            return
        with api.stage("preprocess"):
            body = await receive()
            body = b"" if body["type"] == "http.disconnect" else body["body"]
        await send({"type": "http.response.start", "status": 200, "headers": [(b"x", b"y")]})
        opened = api.stage("inference")
        for number in range(3):
            with opened:
                await asyncio.sleep(0)
            await send({"type": "http.response.body", "body": b"%d" % number, "more_body": True})
        await send({"type": "http.response.body", "body": body})

    made.app = app
    return made


Case = tuple[str, str, bytes]
FASTAPI_CASES: tuple[Case, ...] = (
    ("POST", "/items/3", b'{"a": 1, "b": 2}'), ("POST", "/items/x", b"{"), ("GET", "/thread", b""),
    ("GET", "/tokens", b""), ("GET", "/lines", b""), ("GET", "/many", b""), ("GET", "/raises", b""),
    ("GET", "/background", b""), ("GET", "/fails", b""), ("GET", "/carried", b""),
    ("GET", "/batch", b""), ("GET", "/batch/fails", b""), ("GET", "/m/n/inner", b""),
    ("GET", "/nowhere", b""), ("WS", "/ws", b"hello"),
)  # fmt: skip
RAW_REQUESTS = tuple(
    b"%b HTTP/1.1\r\nhost: h\r\nconnection: close\r\ntraceparent: %b\r\n%b" % (line, PARENT, rest)
    for line, rest in (
        (b"POST /items/3", b"content-type: application/json\r\ncontent-length: 8\r\n\r\n{\"a\": 1}"),
        (b"GET /thread", b"\r\n"), (b"GET /tokens", b"\r\n"), (b"GET /raises", b"\r\n"),
        (b"GET /nowhere?q=1", b"\r\n"),
    )
)  # fmt: skip
RAW_CASES: tuple[Case, ...] = (("POST", "/", b"body"), ("GONE", "/", b""), ("SEND", "/", b"body"))


async def drive(
    app: Any, cases: tuple[Case, ...], run: bytes = b"", late: Callable[[], None] | None = None
) -> list[Any]:
    """Let *app* start, serve *cases* and end.

    *run* is a load run that each request names; *late* is called after the first request.
    """
    incoming: asyncio.Queue[Any] = asyncio.Queue()
    outgoing: asyncio.Queue[Any] = asyncio.Queue()
    scope = {"type": "lifespan", "asgi": {"version": "3.0"}, "state": {}}
    living = asyncio.ensure_future(_called(app, scope, incoming.get, outgoing.put))
    answers: list[Any] = []
    for kind in ("lifespan.startup", "lifespan.shutdown"):
        await incoming.put({"type": kind})
        told = asyncio.ensure_future(outgoing.get())
        await asyncio.wait((living, told), timeout=MOST_S, return_when=asyncio.FIRST_COMPLETED)
        answers.append(told.result()["type"] if told.done() else "nothing")
        told.cancel()
        if kind == "lifespan.startup":
            for number, case in enumerate(cases):
                answers.append(await _served(app, case, run))
                if late is not None and not number:
                    late()
    answers.append(await asyncio.wait_for(living, MOST_S))
    return answers


async def _called(app: Any, scope: Any, receive: Any, send: Any) -> str:
    try:
        await app(scope, receive, send)
    except Exception as error:  # noqa: BLE001 - told as it is
        return f"{type(error).__name__}: {error}"
    return "returned"


async def _served(app: Any, case: Case, run: bytes) -> list[Any]:
    method, path, body = case
    sent: list[Any] = []
    asked = 0

    async def receive() -> Any:
        nonlocal asked
        asked += 1
        if method == "WS":
            return {"type": "websocket.connect"} if asked == 1 else {
                "type": "websocket.receive", "text": body.decode()
            }  # fmt: skip
        if method == "GONE":
            return {"type": "http.disconnect"}
        if asked > 1:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        await asyncio.sleep(0)
        if method == "SEND" and len(sent) == 2:
            raise OSError("the client is gone")
        sent.append(_seen(message))

    headers = [(b"content-type", b"application/json"), (b"traceparent", PARENT)]
    headers += [(b"x-request-start", b"t=%.3f" % (time.time() - 1)), (b"x-queue-start", b"now")]
    if run:
        headers.append((b"baggage", b"stagescope.run=" + run))
    scope = {
        "type": "http" if method != "WS" else "websocket", "method": method, "path": path,
        "raw_path": path.encode() + b"?q=1", "root_path": "", "query_string": b"q=1",
        "headers": headers, "http_version": "1.1", "scheme": "http", "server": ("server", 80),
        "client": ("client", 1), "extensions": {}, "subprotocols": [], "asgi": {"version": "3.0"},
        "state": {},
    }  # fmt: skip
    try:
        ended = await asyncio.wait_for(
            asyncio.create_task(_called(app, scope, receive, send)), MOST_S
        )
    except TimeoutError:
        ended = "hangs"
    return [path, *sent, ended]


def _seen(message: Any) -> Any:
    headers = message.get("headers")
    if headers is not None:
        headers = [list(pair) for pair in headers if pair[0] != b"server-timing"]
        message = {**message, "headers": headers}
    return json.loads(json.dumps(message, default=lambda value: value.decode()))
