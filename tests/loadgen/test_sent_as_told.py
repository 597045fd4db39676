"""What is on the wire is what was asked for: URL, headers, framing, trust."""

from __future__ import annotations

import base64
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from stagescope.errors import StagescopeError, UsageError
from stagescope.loadgen.arrivals import schedule
from stagescope.loadgen.driver import Driver
from stagescope.loadgen.session import drive
from stagescope.loadgen.target import Target, target
from tests.support.http_server import OK, Exchange, ScriptedServer

CERTIFICATE = Path(__file__).parent / "localhost.pem"
"""A self-signed certificate for localhost and its key, valid for a hundred years."""


def send(aim: Target, *, timeout_s: float = 30.0) -> dict[str, Any]:
    """Send one request and return its row."""
    plan = schedule("constant", 1, 1, 0, 0)
    driver = Driver(aim, plan, "run-1", timeout_s=timeout_s)
    drive(driver, aim, 1)
    (chunk,) = driver.log.chunks()
    return {name: values[0] for name, values in chunk.items()}


def sent(server: ScriptedServer) -> Exchange:
    """Return the one request that *server* got."""
    (exchange,) = server.requests
    return exchange


@pytest.mark.parametrize(
    "tail",
    [
        "/d?sig=qZ0A%2BPP2g%3D&t=application%2Fgzip",
        "/p%28x%29/a%2Fb",
        "/v1/models/org%3Amodel",
        "/x?u=http%3A%2F%2Fa%3Fb%3D1&c=d+e",
        "/a//b/../c/./d",
        "/%7Euser?x=%41",
        "/q?list[]=1&y={z}|",
        "",
    ],
)
def test_the_url_is_sent_byte_for_byte(tail: str) -> None:
    """A presigned URL stays valid; the fragment is left out."""
    with ScriptedServer() as server:
        send(target(f"http://127.0.0.1:{server.port}{tail}#part"))
    assert sent(server).start_line == f"GET {tail or '/'} HTTP/1.1"


def test_characters_that_no_url_holds_are_percent_encoded() -> None:
    """As UTF-8."""
    with ScriptedServer() as server:
        send(target(f"http://127.0.0.1:{server.port}/café?n=€"))
    assert sent(server).start_line == "GET /caf%C3%A9?n=%E2%82%AC HTTP/1.1"


def test_a_user_in_the_url_becomes_a_header_unless_there_is_one() -> None:
    """As with curl, a header that was given wins."""
    with ScriptedServer() as server:
        address = f"me:p%40ss@127.0.0.1:{server.port}/"
        send(target(f"http://{address}"))
        send(target(f"http://{address}", headers=("Authorization: Bearer T",)))
    first, second = (exchange.header("authorization") for exchange in server.requests)
    assert first == "Basic " + base64.b64encode(b"me:p@ss").decode()
    assert second == "Bearer T"


def test_what_the_server_may_compress_is_stated_and_can_be_set() -> None:
    """One value, whatever libraries are installed."""
    with ScriptedServer() as server:
        send(target(server.url))
        send(target(server.url, headers=("accept-encoding: identity",)))
    assert [e.header("accept-encoding") for e in server.requests] == ["gzip, deflate", "identity"]
    assert {e.header("user-agent") for e in server.requests} == {"stagescope"}


@pytest.mark.parametrize(
    "head",
    [
        b"x-big: " + b"a" * 100_000 + b"\r\n",
        b"".join(b"x-h%d: 1\r\n" % number for number in range(1_000)),
    ],
    ids=["100 kB", "1,000 lines"],
)
def test_big_response_headers_are_an_answer(head: bytes) -> None:
    """As Go's clients take them."""

    async def big(exchange: Exchange) -> None:
        await exchange.reply(b"HTTP/1.1 200 OK\r\n" + head + b"content-length: 2\r\n\r\nok")

    with ScriptedServer(big) as server:
        row = send(target(server.url))
    assert (row["status"], row["error"]) == (200, "")


def test_the_body_is_sent_although_100_continue_never_comes() -> None:
    """RFC 9110, 10.1.1: a client does not wait for it without limit."""
    with ScriptedServer() as server:  # reads the whole body before it writes a byte
        row = send(target(server.url, body=b"hello", headers=("Expect: 100-continue",)))
    assert (row["status"], row["error"]) == (200, "")
    assert sent(server).body == b"hello"


@contextmanager
def raw_server(answers: list[bytes]) -> Iterator[int]:
    """Listen; read until the end of a chunked body, keep it in *answers*, and answer 200."""

    def serve(listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with connection:
                    data = b""
                    while not data.endswith(b"0\r\n\r\n") and (block := connection.recv(4096)):
                        data += block
                    if data:
                        answers.append(data)
                        connection.sendall(OK)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)


def test_a_body_is_sent_in_chunks_where_the_header_asks_for_it() -> None:
    """Once, whole, and without a Content-Length."""
    requests: list[bytes] = []
    with raw_server(requests) as port:
        aim = target(
            f"http://127.0.0.1:{port}/", body=b"hello", headers=("Transfer-Encoding: chunked",)
        )
        row = send(aim)
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert (row["status"], row["error"]) == (200, "")
    assert body == b"5\r\nhello\r\n0\r\n\r\n"
    assert head.lower().count(b"transfer-encoding: chunked") == 1
    assert b"content-length" not in head.lower()


@pytest.mark.parametrize(
    ("headers", "sentence"),
    [
        (("Content-Length: 3",), "Content-Length: 3 does not fit the body of 5 bytes"),
        (("Transfer-Encoding: gzip",), "Transfer-Encoding: gzip is not usable"),
        (("Transfer-Encoding: chunked", "Content-Length: 5"), "exclude each other"),
    ],
)
def test_headers_that_would_break_the_framing_are_refused(
    headers: tuple[str, ...], sentence: str
) -> None:
    """Before anything is sent, in one sentence."""
    with pytest.raises(UsageError, match=sentence):
        target("http://127.0.0.1/", body=b"hello", headers=headers)


@contextmanager
def tls_server() -> Iterator[str]:
    """Serve https with the certificate of our own, one answer a connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATE)

    def serve(listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with suppress(OSError), connection, context.wrap_socket(connection, True) as wrapped:
                while wrapped.recv(65_536):
                    wrapped.sendall(OK)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        try:
            yield f"https://127.0.0.1:{listener.getsockname()[1]}/"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(20)


def test_a_certificate_of_ones_own_is_trusted_where_it_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By --cacert, by SSL_CERT_FILE, or not checked at all; the error names these ways."""
    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    with tls_server() as url:
        with pytest.raises(StagescopeError) as refused:
            send(target(url))
        for way in ("--cacert", "SSL_CERT_FILE", "--insecure"):
            assert way in str(refused.value)
        assert send(target(url, cacert=CERTIFICATE))["status"] == 200
        assert send(target(url, insecure=True))["status"] == 200
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATE))
        assert send(target(url))["status"] == 200


def test_a_certificate_file_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    """It names the file."""
    with pytest.raises(UsageError, match="nothing-there cannot be used"):
        target("https://127.0.0.1/", cacert=tmp_path / "nothing-there")


def test_first_bytes_of_the_body_are_not_those_of_the_head() -> None:
    """A stream's first token has a stamp of its own, and its pieces are counted."""
    row = {}

    async def stream(exchange: Exchange) -> None:
        await exchange.reply(
            b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
            b"content-length: 24\r\n\r\n"
        )
        import asyncio

        await asyncio.sleep(0.2)
        for _ in range(2):
            await exchange.reply(b"data: token\n")
            await asyncio.sleep(0.1)

    with ScriptedServer(stream) as server:
        row = send(target(server.url))
    assert row["streamed"] is True
    assert row["chunks"] == 2
    assert row["first_body_ns"] - row["first_byte_ns"] > 50_000_000
    assert row["last_byte_ns"] - row["first_body_ns"] > 20_000_000
