"""OpenTelemetry's own span exporters, as the standard `OTEL_*` variables ask for them.

Endpoint, headers, timeout, compression and TLS are read by the exporters themselves;
here it is only decided which of them runs, and each is made to give up when told to.
"""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from stagescope.errors import UsageError

DEFAULT_ENDPOINT: Final = "http://localhost:4318"
GRPC_PORT: Final = 4317


class Outlet(Protocol):
    """Where spans go; `abort` makes a send in progress on another thread end at once."""

    @property
    def name(self) -> str:
        """What a person is told of when it fails."""
        ...

    def send(self, spans: list[ReadableSpan]) -> bool:
        """Send; False where the back end did not take them, however often it was asked."""
        ...

    def abort(self) -> None:
        """End it for good. Called once."""


def outlet_from_environment(environ: Mapping[str, str] = os.environ) -> Outlet | None:
    """Give the outlet that the `OTEL_*` variables ask for; None where they ask for none.

    Nothing is sent unless `OTEL_EXPORTER_OTLP_ENDPOINT`, its `_TRACES_` form or
    `OTEL_TRACES_EXPORTER` is set. Raises UsageError for a value that cannot be used.
    """
    if environ.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return None
    exporter = environ.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if exporter == "none" or not (exporter or _named_endpoint(environ)):
        return None
    if exporter == "console":
        return _console()
    if exporter not in ("", "otlp"):
        raise UsageError(
            f"OTEL_TRACES_EXPORTER={exporter!r} is not supported; give otlp, console or none"
        )
    _check(environ)
    return _otlp(_protocol(environ), _named_endpoint(environ) or DEFAULT_ENDPOINT)


def _named_endpoint(environ: Mapping[str, str]) -> str:
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT"):
        if value := environ.get(variable, "").strip():
            return value
    return ""


def _protocol(environ: Mapping[str, str]) -> str:
    for variable in ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL"):
        if value := environ.get(variable, "").strip().lower():
            if value not in ("grpc", "http/protobuf"):
                raise UsageError(
                    f"{variable}={value!r} is not supported; give grpc or http/protobuf"
                )
            return value
    # The specification's default is HTTP; but 4317 is gRPC's own port, and HTTP fails there.
    return "grpc" if _port(_named_endpoint(environ)) == GRPC_PORT else "http/protobuf"


def _port(endpoint: str) -> int | None:
    try:
        return urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").port
    except ValueError:
        raise UsageError(f"the OTLP endpoint {endpoint!r} is not a URL") from None


def _check(environ: Mapping[str, str]) -> None:
    """Refuse what the exporters would pass over with a line in the log, or not at all."""
    _port(_named_endpoint(environ))
    for kind in ("OTEL_EXPORTER_OTLP_TRACES", "OTEL_EXPORTER_OTLP"):
        compression = environ.get(f"{kind}_COMPRESSION", "none").strip().lower()
        if compression not in ("", "none", "gzip", "deflate"):
            raise UsageError(f"{kind}_COMPRESSION={compression!r} is not none, gzip or deflate")
        timeout = environ.get(f"{kind}_TIMEOUT", "").strip()
        if timeout and not _is_seconds(timeout):
            raise UsageError(f"{kind}_TIMEOUT={timeout!r} is not a number of seconds above 0")


def _is_seconds(text: str) -> bool:
    try:
        return 0 < float(text) < math.inf
    except ValueError:
        return False


def _otlp(protocol: str, endpoint: str) -> Outlet:
    try:
        return _grpc(endpoint) if protocol == "grpc" else _http(endpoint)
    except (ValueError, KeyError, OSError, RuntimeError) as problem:
        raise UsageError(
            f"the OTLP exporter ({protocol}) refuses an OTEL_EXPORTER_OTLP_* variable: {problem}"
        ) from problem


def _grpc(endpoint: str) -> Outlet:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return ClosingOutlet(f"{endpoint} (gRPC)", OTLPSpanExporter())


def _http(endpoint: str) -> Outlet:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    sockets = OpenSockets()
    exporter = OTLPSpanExporter(session=sockets.session())
    return AbortableOutlet(f"{endpoint} (HTTP)", exporter, sockets)


def _console() -> Outlet:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    return ClosingOutlet("the console", ConsoleSpanExporter())


@dataclass(frozen=True, slots=True)
class ClosingOutlet:
    """An exporter whose shutdown ends its calls: closing a gRPC channel cancels them."""

    name: str
    exporter: SpanExporter

    def send(self, spans: list[ReadableSpan]) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        return self.exporter.export(spans) is SpanExportResult.SUCCESS

    def abort(self) -> None:
        """Shut the exporter down."""
        self.exporter.shutdown()


@dataclass(frozen=True, slots=True)
class AbortableOutlet:
    """The HTTP exporter, whose shutdown leaves a request waiting: its sockets are shut as well."""

    name: str
    exporter: SpanExporter
    sockets: OpenSockets

    def send(self, spans: list[ReadableSpan]) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        return self.exporter.export(spans) is SpanExportResult.SUCCESS

    def abort(self) -> None:
        """Shut the exporter down, and what it waits for."""
        self.sockets.shut()
        self.exporter.shutdown()


class OpenSockets:
    """Knows the sockets of one `requests` session, so that another thread can shut them."""

    def __init__(self) -> None:
        self._open: list[socket.socket] = []
        self.is_shut = False

    def session(self) -> Any:
        """Give a `requests.Session` whose connections are known here."""
        import requests
        from requests.adapters import HTTPAdapter

        session = requests.Session()
        for prefix in ("http://", "https://"):
            adapter = HTTPAdapter(pool_connections=1, pool_maxsize=1)
            adapter.poolmanager.pool_classes_by_scheme = self._pool_classes()
            session.mount(prefix, adapter)
        return session

    def _pool_classes(self) -> dict[str, Any]:
        from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

        def known(pool: Any) -> Any:
            connection = type("Known", (_KnownConnection, pool.ConnectionCls), {"owner": self})
            return type("KnownPool", (pool,), {"ConnectionCls": connection})

        return {"http": known(HTTPConnectionPool), "https": known(HTTPSConnectionPool)}

    def add(self, opened: socket.socket) -> None:
        """Remember a socket; raises ConnectionAbortedError once they are shut."""
        self._open = [known for known in self._open if known.fileno() >= 0]
        self._open.append(opened)
        if self.is_shut:
            opened.close()
            raise ConnectionAbortedError("the exporter is being closed")

    def shut(self) -> None:
        """Shut all of them: who waits on one is told at once."""
        self.is_shut = True
        for known in self._open:
            with suppress(OSError):
                known.shutdown(socket.SHUT_RDWR)


class _KnownConnection:
    """Mixed into urllib3's connections: tells its socket to the owner."""

    owner: OpenSockets

    def _new_conn(self) -> socket.socket:
        if self.owner.is_shut:
            raise ConnectionAbortedError("the exporter is being closed")
        inherited: Any = super()
        opened: socket.socket = inherited._new_conn()
        self.owner.add(opened)
        return opened
