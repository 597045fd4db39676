"""Where spans and metrics go: OpenTelemetry's exporters, made to give up when told to."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from opentelemetry import context
from opentelemetry.sdk.metrics.export import MetricsData
from opentelemetry.sdk.trace import ReadableSpan

from stagescope.errors import UsageError
from stagescope.exporters.otlp.environment import (
    CONSOLE,
    DEFAULT_ENDPOINT,
    METRICS,
    SERVED_ANYWAY,
    TRACES,
    check,
    exporter_asked_for,
    named_endpoint,
    protocol,
)

if TYPE_CHECKING:
    from stagescope.exporters.otlp.http_session import CheckedSession, Message

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Transport(Protocol[T_contra]):
    """Where things go; `abort` makes a send in progress on another thread end at once."""

    @property
    def name(self) -> str:
        """What a person is told of when it fails."""
        ...

    @property
    def rejected(self) -> int:
        """How many of the newest sending's spans or points the back end said it did not take."""
        ...

    def send(self, what: T_contra, /) -> bool:
        """Send; False where the back end did not take them, however often it was asked."""
        ...

    def abort(self) -> None:
        """End it for good. Called once."""


class Exporter(Protocol[T_contra]):
    """What OpenTelemetry's span exporters and metric exporters have in common."""

    def export(self, what: T_contra, /) -> Enum:
        """Send, trying again within its own timeout; returns `SUCCESS` or `FAILURE`."""
        ...

    def shutdown(self) -> None:
        """Take nothing more."""


def otlp_transport(
    signal: str,
    grpc: Callable[[], Exporter[T]],
    http: Callable[[Any], Exporter[T]],
    answer: Callable[[], Message],
    environ: Mapping[str, str] = os.environ,
) -> Transport[T]:
    """Make the outlet that the environment asks for.

    *http* takes a `requests.Session`; *answer* gives the class of the back end's answer.
    Raises UsageError for a value that cannot be used.
    """
    check(signal, environ)
    chosen = protocol(signal, environ)
    endpoint = without_user_info(named_endpoint(signal, environ) or DEFAULT_ENDPOINT)
    try:
        if chosen == "grpc":
            exporter = grpc()
            return GrpcTransport(f"{endpoint} (gRPC)", exporter, watched_answers(exporter))
        from stagescope.exporters.otlp.http_session import CheckedSession

        session = CheckedSession(answer())
        return HttpTransport(f"{endpoint} (HTTP)", http(session), session)
    except (ValueError, KeyError, OSError, RuntimeError) as problem:
        raise UsageError(
            f"the OTLP exporter ({chosen}) refuses an OTEL_EXPORTER_OTLP_* variable: {problem}"
        ) from problem


def without_user_info(url: str) -> str:
    """Return *url* without user name and password: it is logged."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


@dataclass(frozen=True, slots=True)
class ConsoleTransport(Generic[T]):
    """Prints; nothing of it can be refused."""

    name: str
    exporter: Exporter[T]
    rejected: int = 0

    def send(self, what: T, /) -> bool:
        """Print all of it."""
        return self.exporter.export(what).name == "SUCCESS"

    def abort(self) -> None:
        """Shut the exporter down."""
        self.exporter.shutdown()


@dataclass(frozen=True, slots=True)
class GrpcTransport(Generic[T]):
    """An exporter whose shutdown ends its calls: closing a gRPC channel cancels them.

    gRPC itself has a deadline for the whole call and takes no answer above 4 MiB.
    """

    name: str
    exporter: Exporter[T]
    answers: deque[Any]
    """The newest answer."""

    @property
    def rejected(self) -> int:
        """What the newest answer said was not taken."""
        partial = getattr(self.answers[-1], "partial_success", None) if self.answers else None
        counts = (getattr(partial, f"rejected_{what}", 0) for what in ("spans", "data_points"))
        return max(0, *counts)

    def send(self, what: T, /) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        self.answers.clear()
        return self.exporter.export(what).name == "SUCCESS"

    def abort(self) -> None:
        """Shut the exporter down."""
        self.exporter.shutdown()


def watched_answers(exporter: Any) -> deque[Any]:
    """Return where the newest answer to *exporter* will be: the exporter itself drops it.

    Its stub is private; where a release has another, rejected spans go unnoticed.
    """
    answers: deque[Any] = deque(maxlen=1)
    inner = getattr(exporter, "_stub", None)
    if not callable(inner):
        return answers

    def stub(channel: Any) -> Any:
        client: Any = inner(channel)
        export = client.Export

        def kept(*args: Any, **kwargs: Any) -> Any:
            answer = export(*args, **kwargs)
            answers.append(answer)
            return answer

        client.Export = kept
        return client

    exporter._stub = stub
    if getattr(exporter, "_client", None) is not None:
        exporter._client = stub(exporter._channel)
    return answers


@dataclass(frozen=True, slots=True)
class HttpTransport(Generic[T]):
    """An HTTP exporter, whose shutdown leaves a request waiting: its sockets are shut as well."""

    name: str
    exporter: Exporter[T]
    session: CheckedSession

    @property
    def rejected(self) -> int:
        """What the newest answer said was not taken."""
        return self.session.rejected

    def send(self, what: T, /) -> bool:
        """Send through the exporter, which retries within its own timeout."""
        return self.exporter.export(what).name == "SUCCESS"

    def abort(self) -> None:
        """Shut the exporter down, and what it waits for."""
        self.session.shut()
        self.exporter.shutdown()


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
    """Take what the exporters log on this thread; returns their newest messages.

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
    """Return the outlet that the `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError for a value that cannot be used.
    """
    exporter = exporter_asked_for(TRACES, environ)
    if not exporter:
        return None
    return (
        _console_spans()
        if exporter == CONSOLE
        else otlp_transport(TRACES, _grpc_spans, _http_spans, _answer_to_spans, environ)
    )


def _grpc_spans() -> Exporter[Spans]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _http_spans(session: Any) -> Exporter[Spans]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(session=session)


def _answer_to_spans() -> Message:
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

    return ExportTraceServiceResponse


def _console_spans() -> Transport[Spans]:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    exporter: Exporter[Spans] = ConsoleSpanExporter()
    return ConsoleTransport("the console", exporter)


def metric_transport_from_environment(
    environ: Mapping[str, str] = os.environ,
) -> Transport[MetricsData] | None:
    """Return the outlet that the `OTEL_*` variables ask for; None where they ask for none.

    `OTEL_METRICS_EXPORTER=prometheus` is what we do anyway. Raises UsageError for a value that
    cannot be used.
    """
    exporter = exporter_asked_for(METRICS, environ, served_anyway=SERVED_ANYWAY)
    if not exporter:
        return None
    return (
        _console_metrics()
        if exporter == CONSOLE
        else otlp_transport(METRICS, _grpc_metrics, _http_metrics, _answer_to_metrics, environ)
    )


def _grpc_metrics() -> Exporter[MetricsData]:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter()


def _http_metrics(session: Any) -> Exporter[MetricsData]:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter(session=session)


def _answer_to_metrics() -> Message:
    from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
        ExportMetricsServiceResponse,
    )

    return ExportMetricsServiceResponse


def _console_metrics() -> Transport[MetricsData]:
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

    exporter: Exporter[MetricsData] = ConsoleMetricExporter()
    return ConsoleTransport("the console", exporter)
