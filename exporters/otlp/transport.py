"""Where spans and metrics go: OpenTelemetry's exporters, made to give up when told to."""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import Any, Final, Generic, Protocol, TypeVar

from opentelemetry import context
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.trace import ReadableSpan

from stagescope.errors import UsageError
from stagescope.exporters.otlp.environment import (
    CONSOLE,
    DEFAULT_ENDPOINT,
    METRICS,
    TRACES,
    check,
    exporter_asked_for,
    named_endpoint,
    protocol,
)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Transport(Protocol[T_contra]):
    """Where things go; `abort` makes a send in progress on another thread end at once."""

    @property
    def name(self) -> str:
        """What a person is told of when it fails."""
        ...

    def send(self, what: T_contra, /) -> bool:
        """Send; False where the back end did not take them, however often it was asked."""
        ...

    def abort(self) -> None:
        """End it for good. Called once."""


class Exporter(Protocol[T_contra]):
    """What OpenTelemetry's span exporters and metric exporters have in common."""

    def export(self, what: T_contra, /) -> Enum:
        """Send, trying again within its own timeout; gives `SUCCESS` or `FAILURE`."""
        ...

    def shutdown(self) -> None:
        """Take nothing more."""


def otlp_transport(
    signal: str,
    grpc: Callable[[], Exporter[T]],
    http: Callable[[Any], Exporter[T]],
    environ: Mapping[str, str] = os.environ,
) -> Transport[T]:
    """Make the outlet that the environment asks for; *http* takes a `requests.Session`.

    Raises UsageError for a value that cannot be used.
    """
    check(signal, environ)
    chosen = protocol(signal, environ)
    endpoint = named_endpoint(signal, environ) or DEFAULT_ENDPOINT
    try:
        if chosen == "grpc":
            return ClosingTransport(f"{endpoint} (gRPC)", grpc())
        sockets = OpenSockets()
        return AbortableTransport(f"{endpoint} (HTTP)", http(sockets.session()), sockets)
    except (ValueError, KeyError, OSError, RuntimeError) as problem:
        raise UsageError(
            f"the OTLP exporter ({chosen}) refuses an OTEL_EXPORTER_OTLP_* variable: {problem}"
        ) from problem


@dataclass(frozen=True, slots=True)
class ClosingTransport(Generic[T]):
    """An exporter whose shutdown ends its calls: closing a gRPC channel cancels them."""

    name: str
    exporter: Exporter[T]

    def send(self, what: T, /) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        return self.exporter.export(what).name == "SUCCESS"

    def abort(self) -> None:
        """Shut the exporter down."""
        self.exporter.shutdown()


@dataclass(frozen=True, slots=True)
class AbortableTransport(Generic[T]):
    """An HTTP exporter, whose shutdown leaves a request waiting: its sockets are shut as well."""

    name: str
    exporter: Exporter[T]
    sockets: OpenSockets

    def send(self, what: T, /) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        return self.exporter.export(what).name == "SUCCESS"

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


CHATTY: Final = (
    "opentelemetry.exporter.otlp.common.http",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.grpc.metric_exporter",
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "urllib3.connectionpool",
)
"""Loggers that would say the same at every failed attempt."""


@contextmanager
def taken_log_records() -> Generator[deque[str]]:
    """Take what the exporters log on this thread; gives their newest messages.

    What they log on other threads, for the app's own spans, stays as it is.
    """
    own = threading.get_ident()
    said: deque[str] = deque(maxlen=4)

    def take(record: logging.LogRecord) -> bool:
        if record.thread != own:
            return True
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())
        return False

    loggers = [logging.getLogger(name) for name in CHATTY]
    for logger in loggers:
        # First in the list: OpenTelemetry's filter of duplicates would hide them from us.
        logger.filters.insert(0, take)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeFilter(take)


@contextmanager
def suppressed_instrumentation() -> Generator[None]:
    """Make no spans of our own requests where the app has instrumented its HTTP client."""
    suppressed = context.get_current()
    for named in ("_SUPPRESS_INSTRUMENTATION_KEY", "_SUPPRESS_HTTP_INSTRUMENTATION_KEY"):
        # Made at import under a random name, and public nowhere in what we depend on.
        if key := getattr(context, named, None):
            suppressed = context.set_value(key, True, suppressed)
    token = context.attach(suppressed)
    try:
        yield
    finally:
        context.detach(token)


Spans = list[ReadableSpan]


def span_transport_from_environment(
    environ: Mapping[str, str] = os.environ,
) -> Transport[Spans] | None:
    """Give the outlet that the `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError for a value that cannot be used.
    """
    exporter = exporter_asked_for(TRACES, environ)
    if not exporter:
        return None
    return (
        _console_spans()
        if exporter == CONSOLE
        else otlp_transport(TRACES, _grpc_spans, _http_spans, environ)
    )


def _grpc_spans() -> Exporter[Spans]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _http_spans(session: Any) -> Exporter[Spans]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(session=session)


def _console_spans() -> Transport[Spans]:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    exporter: Exporter[Spans] = ConsoleSpanExporter()
    return ClosingTransport("the console", exporter)


def metric_transport_from_environment(
    environ: Mapping[str, str] = os.environ,
) -> Transport[MetricsData] | None:
    """Give the outlet that the `OTEL_*` variables ask for; None where they ask for none.

    `OTEL_METRICS_EXPORTER=prometheus` is what we do anyway. Raises UsageError for a value that
    cannot be used.
    """
    exporter = exporter_asked_for(METRICS, environ, served_anyway=("prometheus",))
    if not exporter:
        return None
    return (
        _console_metrics()
        if exporter == CONSOLE
        else otlp_transport(METRICS, _grpc_metrics, _http_metrics, environ)
    )


def _grpc_metrics() -> Exporter[MetricsData]:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter()


def _http_metrics(session: Any) -> Exporter[MetricsData]:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter(session=session)


def _console_metrics() -> Transport[MetricsData]:
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

    exporter: Exporter[MetricsData] = ConsoleMetricExporter()
    return ClosingTransport("the console", exporter)
