"""A `requests` session for OTLP/HTTP: a deadline for the whole call, a bounded answer, no redirect.

`requests` has a timeout for each read, so an answer of one byte a second would hold it for ever,
and it reads an answer of any size. OpenTelemetry's exporters take every status below 400 for
success and look at no answer. All three are put right here, below the exporter, and so is
OTLP/JSON, for which there is no exporter but a beta that pins another SDK.
"""

from __future__ import annotations

import base64
import gzip
import json
import socket
import threading
import zlib
from collections.abc import Callable
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

    def __init__(self, answer: Message, as_json: Message | None = None) -> None:
        """*as_json* is the class of what is sent, where that is to be sent as JSON."""
        super().__init__()
        self.rejected = 0
        """How many spans or points were not taken, by the newest answer."""
        self.is_shut = False
        self._answer, self._as_json = answer, as_json
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
        if self._as_json:
            self._make_json(kwargs, self._as_json)
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

    def _make_json(self, request: dict[str, Any], message: Message) -> None:
        """Turn what the exporter sends as protobuf into OTLP/JSON, compressed as it was.

        https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding: protobuf's own mapping,
        but for ids, which are hexadecimal, and enums, which are numbers.
        """
        from google.protobuf.json_format import MessageToDict  # type: ignore[import-untyped]

        headers = {name.lower(): value for name, value in (request.get("headers") or {}).items()}
        unpack, pack = _CODINGS[
            headers.get("content-encoding") or self.headers.get("Content-Encoding") or ""
        ]
        sent = MessageToDict(
            message.FromString(unpack(request["data"])), use_integers_for_enums=True
        )
        _write_ids_in_hex(sent)
        request["data"] = pack(json.dumps(sent).encode())
        request["headers"] = headers | {"content-type": "application/json"}

    def _check(self, response: requests.Response, body: bytes) -> None:
        if len(body) > MAX_ANSWER_BYTES:
            raise AnswerError(f"its answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
        if not 200 <= response.status_code < 300:
            raise AnswerError(f"it answered {response.status_code}, and redirects are not followed")
        try:
            if response.headers.get("Content-Type", "").startswith("application/json"):
                from google.protobuf.json_format import Parse

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


Coding = Callable[[bytes], bytes]
_CODINGS: Final[dict[str, tuple[Coding, Coding]]] = {
    "gzip": (gzip.decompress, gzip.compress),
    "deflate": (zlib.decompress, zlib.compress),
    "": (bytes, bytes),
}
_IDS: Final = ("traceId", "spanId", "parentSpanId")


def _write_ids_in_hex(part: Any) -> None:
    if isinstance(part, list):
        for each in part:
            _write_ids_in_hex(each)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name in _IDS:
                part[name] = base64.b64decode(value).hex()
            else:
                _write_ids_in_hex(value)


class _KnownConnection:
    """Mixed into urllib3's connections: passes its socket to the owner."""

    owner: CheckedSession

    def _new_conn(self) -> socket.socket:
        if self.owner.is_shut:
            raise ConnectionAbortedError("the exporter is being closed")
        inherited: Any = super()
        opened: socket.socket = inherited._new_conn()
        self.owner.add(opened)
        return opened
