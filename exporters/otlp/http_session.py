"""A `requests` session for OTLP/HTTP: a deadline for the whole call, a bounded answer, no redirect.

`requests` has a timeout for each read, so an answer of one byte a second would hold it for ever,
and it reads an answer of any size. OpenTelemetry's exporters take every status below 400 for
success and look at no answer. All three are put right here, below the exporter.
"""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import Any, Final, Protocol

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

MAX_ANSWER_BYTES: Final = 4 << 20
"""An OTLP answer has some tens of bytes; what is longer is none."""


class AnswerError(Exception):
    """The back end answered, but not that it has taken what was sent; trying again is no use."""


class Message(Protocol):
    """An OTLP `Export…ServiceResponse` class."""

    def FromString(self, s: bytes, /) -> Any:
        """Parse; raises DecodeError."""
        ...


class CheckedSession(requests.Session):
    """Sends one request at a time; `shut` ends it from another thread.

    Raises AnswerError where the answer is no success.
    """

    def __init__(self, answer: Message) -> None:
        super().__init__()
        self.rejected = 0
        """How many spans or points the newest answer said were not taken."""
        self.is_shut = False
        self._answer = answer
        self._open: list[socket.socket] = []
        self.headers["Accept-Encoding"] = "identity"
        for prefix in ("http://", "https://"):
            adapter = HTTPAdapter(pool_connections=1, pool_maxsize=1)
            adapter.poolmanager.pool_classes_by_scheme = self._pool_classes()
            self.mount(prefix, adapter)

    def request(self, *args: Any, **kwargs: Any) -> requests.Response:
        """Send, and read the whole answer, within `timeout` seconds."""
        self.rejected = 0
        kwargs |= {"allow_redirects": False, "stream": True}
        timeout_s = kwargs.get("timeout") or 10.0
        expired = threading.Event()
        timer = threading.Timer(timeout_s, self._expire, (expired,))
        timer.daemon = True
        timer.start()
        try:
            response = super().request(*args, **kwargs)
            try:
                body = response.raw.read(MAX_ANSWER_BYTES + 1, decode_content=False)
                if expired.is_set():  # a header that is cut off is taken for a whole one
                    raise AnswerError(f"its answer was not whole after {timeout_s:.0f} s")
                if response.status_code < 400:
                    self._check(response, body)
            except BaseException:
                response.close()
                raise
        finally:
            timer.cancel()
        return response

    def _check(self, response: requests.Response, body: bytes) -> None:
        if len(body) > MAX_ANSWER_BYTES:
            raise AnswerError(f"its answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
        if not 200 <= response.status_code < 300:
            raise AnswerError(f"it answered {response.status_code}, and redirects are not followed")
        try:
            if response.headers.get("Content-Type", "").startswith("application/json"):
                from google.protobuf.json_format import Parse  # type: ignore[import-untyped]

                answer = Parse(body or b"{}", self._answer.FromString(b""))
            else:
                answer = self._answer.FromString(body)
        except Exception as problem:
            raise AnswerError(
                f"it answered {response.status_code} with something that is no OTLP"
            ) from problem
        partial = answer.partial_success
        self.rejected = max(
            0,
            getattr(partial, "rejected_spans", 0) or getattr(partial, "rejected_data_points", 0),
        )

    def shut(self) -> None:
        """End a request in progress, and refuse all that follow."""
        self.is_shut = True
        self._interrupt()

    def add(self, opened: socket.socket) -> None:
        """Remember a socket; raises ConnectionAbortedError once they are shut."""
        self._open = [known for known in self._open if known.fileno() >= 0]
        self._open.append(opened)
        if self.is_shut:
            opened.close()
            raise ConnectionAbortedError("the exporter is being closed")

    def _expire(self, expired: threading.Event) -> None:
        expired.set()
        self._interrupt()

    def _interrupt(self) -> None:
        for known in self._open:
            with suppress(OSError):
                known.shutdown(socket.SHUT_RDWR)

    def _pool_classes(self) -> dict[str, Any]:
        def known(pool: Any) -> Any:
            connection = type("Known", (_KnownConnection, pool.ConnectionCls), {"owner": self})
            return type("KnownPool", (pool,), {"ConnectionCls": connection})

        return {"http": known(HTTPConnectionPool), "https": known(HTTPSConnectionPool)}


class _KnownConnection:
    """Mixed into urllib3's connections: tells its socket to the owner."""

    owner: CheckedSession

    def _new_conn(self) -> socket.socket:
        if self.owner.is_shut:
            raise ConnectionAbortedError("the exporter is being closed")
        inherited: Any = super()
        opened: socket.socket = inherited._new_conn()
        self.owner.add(opened)
        return opened
