"""A small HTTP server of threads over a Unix socket or TCP that leaves nothing behind when stopped.

Standard library, because it runs inside served processes too.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer
from typing import Any, cast
from urllib.parse import parse_qsl

from stagescope.errors import StagescopeError

MAX_CONNECTIONS = 32
IDLE_S = 10.0
"""A client that sends or takes nothing for so long is cut off."""
GRACE_S = 0.3
"""How long `stop` lets answers finish that are under way."""
SOCKET_PATH_BYTES = 107
"""What Linux takes (sun_path less its end); others take fewer and say so at bind."""


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked; *path* without query string, of which *query* has each name's last value."""

    method: str
    path: str
    headers: Mapping[str, str]
    query: Mapping[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True, slots=True)
class Reply:
    """What to answer; a *body* in pieces is sent chunked, as it comes."""

    body: bytes | Iterable[bytes]
    content_type: str = "application/json"
    status: int = HTTPStatus.OK


def json_reply(value: object, status: int = HTTPStatus.OK) -> Reply:
    """Give *value* as JSON."""
    return Reply(json.dumps(value).encode() + b"\n", status=status)


def problem(status: int, sentence: str) -> Reply:
    """Give one sentence that says what was wrong."""
    return json_reply({"error": sentence}, status)


Answer = Callable[[Request], Reply]


class HttpServer(TCPServer):
    """Answers requests on one address until `stop`.

    *token*: what `Authorization: Bearer` must carry; None asks for none.
    """

    allow_reuse_address = True
    request_queue_size = 64

    def __init__(
        self, address: Path | tuple[str, int], answer: Answer, *, token: str | None = None
    ) -> None:
        self.answer = answer
        self.token = token
        self._stopping = False
        self._open: dict[socket.socket, threading.Thread] = {}
        self._open_lock = threading.Lock()
        self._path = address if isinstance(address, Path) else None
        if isinstance(address, Path):
            self.address_family = socket.AF_UNIX
            self.allow_reuse_address = False
            super().__init__(str(address), _Exchange)  # type: ignore[arg-type]
        else:
            self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
            super().__init__(address, _Exchange)
        self._thread = threading.Thread(target=self._serve, name="stagescope-http", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """The TCP port."""
        return int(self.socket.getsockname()[1])

    def server_bind(self) -> None:
        """Bind; a Unix socket is made for its owner alone, whatever the umask."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)  # a dead agent's: who gets here holds the spool
            with contextlib.suppress(OSError):  # Linux: bind then makes the file with this mode
                os.fchmod(self.socket.fileno(), 0o600)
            self.socket.bind(str(self._path))
            self._path.chmod(0o600)
        else:
            super().server_bind()

    def _serve(self) -> None:
        while not self._stopping:
            try:
                connection, peer = self.get_request()
            except OSError:
                if not self._stopping:
                    threading.Event().wait(0.05)  # out of descriptors: it may pass
                continue
            if len(self._open) >= MAX_CONNECTIONS:
                self.shutdown_request(connection)
            else:
                self.process_request(connection, peer)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer in a thread; book is kept of them, so that `stop` leaves none behind."""
        thread = threading.Thread(
            target=self._exchange, args=(request, client_address), daemon=True,
            name="stagescope-http-exchange",
        )  # fmt: skip
        with self._open_lock:
            self._open[request] = thread
        thread.start()

    def _exchange(self, connection: socket.socket, peer: Any) -> None:
        try:
            with contextlib.suppress(OSError):  # a client that went away is no error of ours
                self.finish_request(connection, peer)
        finally:
            self.shutdown_request(connection)
            with self._open_lock:
                del self._open[connection]

    def stop(self) -> None:
        """Stop listening, cut off who is connected, wait for the threads."""
        self._stopping = True
        self.close_inherited(shutdown=True)
        self._thread.join(2.0)
        with self._open_lock:
            threads = dict(self._open)
        deadline = time.monotonic() + GRACE_S
        for connection, thread in threads.items():
            if thread is threading.current_thread():
                continue
            thread.join(max(0.0, deadline - time.monotonic()))
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join(2.0)
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def close_inherited(self, *, shutdown: bool = False) -> None:
        """Close the listening socket; in a forked child without shutting down the parent's."""
        if shutdown:
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self.socket.close()


class _Exchange(BaseHTTPRequestHandler):
    """One connection: one request and its answer."""

    protocol_version = "HTTP/1.1"
    server_version = "stagescope"
    sys_version = ""
    timeout = IDLE_S

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.close_connection = True
        server = cast(HttpServer, self.server)
        if server.token is not None and not self._authorised(server.token):
            self._send(problem(HTTPStatus.UNAUTHORIZED, "this needs the agent's bearer token"))
            return
        path, _, query = self.path.partition("?")
        asked = dict(parse_qsl(query, keep_blank_values=True))
        self._send(server.answer(Request(self.command, path, dict(self.headers.items()), asked)))

    def _authorised(self, token: str) -> bool:
        given = self.headers.get("Authorization", "")
        return hmac.compare_digest(given.encode("utf-8", "replace"), f"Bearer {token}".encode())

    def _send(self, reply: Reply) -> None:
        self.send_response(reply.status)
        self.send_header("Content-Type", reply.content_type)
        self.send_header("Connection", "close")
        if reply.status == HTTPStatus.UNAUTHORIZED:
            self.send_header("WWW-Authenticate", "Bearer")
        if isinstance(reply.body, bytes):
            self.send_header("Content-Length", str(len(reply.body)))
            self.end_headers()
            self.wfile.write(reply.body)
            return
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for piece in reply.body:
            self.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: a server's own log is not ours to write in."""


def check_socket_path(path: Path) -> None:
    """Raise StagescopeError where the operating system would not take *path* for a socket."""
    if (length := len(os.fsencode(path))) > SOCKET_PATH_BYTES:
        raise StagescopeError(
            f"socket path {path} is {length} bytes long and the system takes "
            f"{SOCKET_PATH_BYTES}: choose a shorter spool folder (--spool, STAGESCOPE_SPOOL)"
        )
