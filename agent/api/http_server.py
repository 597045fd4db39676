"""A small HTTP server of threads over a Unix socket or TCP that leaves nothing behind when stopped.

Standard library, because it runs inside served processes too.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, cast
from urllib.parse import parse_qsl, urlsplit

from stagescope.errors import StagescopeError

_log = logging.getLogger("stagescope")

MAX_CONNECTIONS = 32
"""With more, the oldest one that has not sent its request is cut off."""
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
    """Return *value* as JSON."""
    return Reply(json.dumps(value).encode() + b"\n", status=status)


def problem(status: int, sentence: str) -> Reply:
    """Return one sentence that says what was wrong."""
    return json_reply({"error": sentence}, status)


Answer = Callable[[Request], Reply]


class HttpServer(ThreadingMixIn, TCPServer):
    """Answers requests on one address until `stop`.

    *token*: what `Authorization: Bearer` must carry; None asks for none. On a loopback address
    only loopback names are taken for `Host`, so that no web page can ask by a name of its own
    that it made point here (DNS rebinding).
    """

    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(
        self, address: Path | tuple[str, int], answer: Answer, *, token: str | None = None
    ) -> None:
        self.answer = answer
        self.token = token
        self.loopback_only = not isinstance(address, Path) and _is_loopback(address[0])
        self._stopping = False
        self._open: dict[socket.socket, threading.Thread] = {}
        """Connections and the threads that serve them, oldest first."""
        self._unanswered: set[socket.socket] = set()
        """Of those: the request has not come yet."""
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
            self._bound = self._path.lstat()
            if self._bound.st_mode & 0o077:
                self._path.chmod(0o600)
        else:
            super().server_bind()

    def _is_ours(self, path: Path) -> bool:
        """Return whether the socket there is the one that we made: not a successor's."""
        with contextlib.suppress(OSError):
            return os.path.samestat(self._bound, path.lstat())
        return False

    def _serve(self) -> None:
        # Not `serve_forever`: that wakes up twice a second to look whether it has to end.
        while not self._stopping:
            try:
                connection, peer = self.get_request()
            except OSError:
                if not self._stopping:
                    threading.Event().wait(0.05)  # out of descriptors: it may pass
                continue
            if len(self._open) >= MAX_CONNECTIONS:
                self._make_room()
            self.process_request(connection, peer)

    def _make_room(self) -> None:
        """Cut off the oldest connection whose request has not come yet, or else the oldest."""
        with self._open_lock:
            waiting = (one for one in self._open if one in self._unanswered)
            oldest = next(waiting, None) or next(iter(self._open), None)
        if oldest is not None:
            with contextlib.suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection; `stop` finds it while it is open."""
        with self._open_lock:
            self._open[request] = threading.current_thread()
            self._unanswered.add(request)
        try:
            super().process_request_thread(request, client_address)
        finally:
            with self._open_lock:
                del self._open[request]
                self._unanswered.discard(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log a fault of ours; a client that went away is none."""
        error = sys.exception()
        if not isinstance(error, OSError):
            _log.error("a fault while answering at the control API", exc_info=error)

    def request_came(self, connection: socket.socket) -> None:
        """Note that the request of *connection* is there and is being answered."""
        with self._open_lock:
            self._unanswered.discard(connection)

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
        if self._path is not None and self._is_ours(self._path):
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
        server.request_came(self.connection)
        if server.loopback_only and not _is_loopback(_host_of(self.headers.get("Host", ""))):
            self._send(problem(HTTPStatus.FORBIDDEN, "ask by a loopback address: this port is for "
                               "this machine alone"))  # fmt: skip
            return
        if server.token is not None and not self._authorised(server.token):
            self._send(problem(HTTPStatus.UNAUTHORIZED, "this needs the agent's bearer token"))
            return
        path, _, query = self.path.partition("?")
        asked = dict(parse_qsl(query, keep_blank_values=True))
        self._send(
            server.answer(
                Request(
                    self.command,
                    path,
                    {name.title(): value for name, value in self.headers.items()},
                    asked,
                )
            )
        )

    def _authorised(self, token: str) -> bool:
        scheme, _, given = self.headers.get("Authorization", "").partition(" ")
        same = hmac.compare_digest(given.strip().encode("utf-8", "replace"), token.encode())
        return same and scheme.lower() == "bearer"  # RFC 9110, 11.1: schemes are case-insensitive

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
        """Log nothing: standard error is the server's."""


def _host_of(header: str) -> str:
    """Return the host of a `Host` header without its port; loopback where none was sent."""
    try:
        return (urlsplit(f"//{header}").hostname or "") if header else "localhost"
    except ValueError:  # brackets that do not close
        return ""


def _is_loopback(host: str) -> bool:
    if host.lower().rstrip(".") == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_socket_path(path: Path) -> None:
    """Raise StagescopeError where the operating system would not take *path* for a socket."""
    if (length := len(os.fsencode(path))) > SOCKET_PATH_BYTES:
        raise StagescopeError(
            f"socket path {path} is {length} bytes long and the system takes "
            f"{SOCKET_PATH_BYTES}: choose a shorter spool folder (--spool, STAGESCOPE_SPOOL)"
        )
