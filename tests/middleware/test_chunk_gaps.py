"""Streams, as model servers send tokens: first byte, chunks, and the times between them."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.types import Receive, Scope, Send
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.clock import HandClock
from stagescope.testing.recording import Recording
from tests.support.serving import exchange, served

GET = b"GET %s HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
MS = 1_000_000


@pytest.fixture(autouse=True)
def _our_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """What our guard would swallow fails the test."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A small recorder file."""
    with closing(Recording(tmp_path)) as found:
        yield found


async def tokens(request: Request) -> Response:
    """Send four server-sent events, 20 ms apart, the last one after 60 ms."""

    async def events() -> AsyncIterator[str]:
        for number, pause_s in enumerate((0.0, 0.02, 0.02, 0.06)):
            await asyncio.sleep(pause_s)
            yield f"data: {number}\n\n"

    return StreamingResponse(events(), media_type="text/event-stream")


async def whole(request: Request) -> Response:
    """Send one body."""
    return PlainTextResponse("all at once")


APP = Starlette(routes=[Route("/tokens", tokens), Route("/whole", whole)])


def recorded(recording: Recording, path: bytes) -> RequestRecord:
    """Serve APP really, ask for *path*, and give the record."""
    with served(StageMiddleware.around(APP, recording.recorder)) as port:
        assert b" 200 " in exchange(port, GET % path)
        return wait_until(lambda: recording.requests)[0]


@pytest.mark.parametrize("http", ["h11", "httptools"])
def test_times_between_tokens_are_in_the_record(recording: Recording, http: str) -> None:
    """Mean and longest time between server-sent events come out as they were slept."""
    with served(StageMiddleware.around(APP, recording.recorder), http=http) as port:
        assert exchange(port, GET % b"/tokens").count(b"data: ") == 4
        record = wait_until(lambda: recording.requests)[0]

    assert record.chunk_gaps == 3
    # Each token is a little late by itself, which shortens the time to the next one.
    assert 90 * MS <= record.chunk_gap_sum_ns < 300 * MS
    assert 50 * MS <= record.chunk_gap_max_ns < 200 * MS
    assert record.first_byte_ns + record.chunk_gap_sum_ns <= record.duration_ns
    assert {"respond.first_byte", "respond.stream"} <= set(record.self_ns())


def test_a_reply_of_one_chunk_has_no_times_between(recording: Recording) -> None:
    """Nothing is written for what is not streamed."""
    record = recorded(recording, b"/whole")

    assert record.chunks == 1
    assert (record.chunk_gaps, record.chunk_gap_sum_ns, record.chunk_gap_max_ns) == (0, 0, 0)


def test_chunks_without_bytes_are_no_tokens(tmp_path: Path) -> None:
    """Empty messages, before, between and at the end, do not count; a last one with bytes does."""
    clock = HandClock()

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for body in (b"", b"a", b"", b"b", b"c"):
            clock.tick(5)
            await send({"type": "http.response.body", "body": body, "more_body": body != b"c"})

    async def receive() -> dict[str, object]:
        return {"type": "http.request"}

    async def send(message: object) -> None:
        clock.tick(1)

    scope: Scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    with closing(Recording(tmp_path, clock=clock)) as recording:
        asyncio.run(StageMiddleware.around(app, recording.recorder)(scope, receive, send))
        (record,) = recording.requests

    assert record.chunks == 5
    assert (record.chunk_gaps, record.chunk_gap_sum_ns, record.chunk_gap_max_ns) == (2, 18, 12)


def test_a_client_that_leaves_a_stream_leaves_what_was_sent(recording: Recording) -> None:
    """A stream cut short keeps the times of the tokens that went out."""
    with served(StageMiddleware.around(APP, recording.recorder)) as port:
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(GET % b"/tokens")
            while b"data: 1" not in connection.recv(65536):
                pass
        record = wait_until(lambda: recording.requests)[0]

    assert record.chunk_gaps in (1, 2, 3)
    assert record.chunk_gap_max_ns <= record.chunk_gap_sum_ns
