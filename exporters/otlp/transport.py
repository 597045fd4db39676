"""Where spans and metrics go: OpenTelemetry's exporters, made to stop when asked to."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pkgutil import resolve_name
from typing import Any, Final, Generic, Protocol, TypeVar
from urllib.parse import urlsplit, urlunsplit

from opentelemetry import context
from opentelemetry.sdk.trace import ReadableSpan

from stagescope.errors import UsageError
from stagescope.exporters.otlp.environment import (
    CONSOLE,
    DEFAULT_ENDPOINT,
    METRICS,
    TRACES,
    check,
    exporter_asked_for,
    http_url,
    named_endpoint,
    protocol,
)

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)


class Exporter(Protocol[T_contra]):
    """What OpenTelemetry's span exporters and metric exporters have in common."""

    def export(self, what: T_contra, /) -> Enum:
        """Send, trying again within its own timeout; returns `SUCCESS` or `FAILURE`."""
        ...

    def shutdown(self) -> None:
        """Take nothing more."""


Spans = list[ReadableSpan]


@dataclass(frozen=True, slots=True)
class Transport(Generic[T]):
    """Where spans or metrics go."""

    name: str
    """How the log calls it."""
    exporter: Exporter[T]
    rejected: Callable[[], int] = lambda: 0
    """Returns how many of the newest sending's spans or points the back end did not take."""
    shut: Callable[[], None] = lambda: None
    """Ends what the exporter's own shutdown leaves waiting."""

    def send(self, what: T, /) -> bool:
        """Send through the exporter, which tries again within its own timeout; False: not taken."""
        return self.exporter.export(what).name == "SUCCESS"

    def abort(self) -> None:
        """End it for good, also a send in progress on another thread. Called once."""
        self.shut()
        self.exporter.shutdown()


@dataclass(frozen=True, slots=True)
class _Names:
    """What OpenTelemetry calls a signal's classes: `module:class`."""

    grpc: str
    http: str
    console: str
    request: str
    answer: str


_OTLP = "opentelemetry.exporter.otlp.proto"
_NAMES: Final = {
    TRACES: _Names(
        f"{_OTLP}.grpc.trace_exporter:OTLPSpanExporter",
        f"{_OTLP}.http.trace_exporter:OTLPSpanExporter",
        "opentelemetry.sdk.trace.export:ConsoleSpanExporter",
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2:ExportTraceServiceRequest",
        "opentelemetry.proto.collector.trace.v1.trace_service_pb2:ExportTraceServiceResponse",
    ),
    METRICS: _Names(
        f"{_OTLP}.grpc.metric_exporter:OTLPMetricExporter",
        f"{_OTLP}.http.metric_exporter:OTLPMetricExporter",
        "opentelemetry.sdk.metrics.export:ConsoleMetricExporter",
        "opentelemetry.proto.collector.metrics.v1.metrics_service_pb2:ExportMetricsServiceRequest",
        "opentelemetry.proto.collector.metrics.v1.metrics_service_pb2:ExportMetricsServiceResponse",
    ),
}


def transport_from_environment(
    signal: str, environ: Mapping[str, str] = os.environ
) -> Transport[Any] | None:
    """Return where the `OTEL_*` variables want *signal* sent; None where they ask for nothing.

    Imports no more than that needs. Raises UsageError for a value that cannot be used.
    """
    asked = exporter_asked_for(signal, environ)
    if not asked:
        return None
    names = _NAMES[signal]
    if asked == CONSOLE:
        return Transport("the console", resolve_name(names.console)())
    check(signal, environ)
    chosen = protocol(signal, environ)
    given = named_endpoint(signal, environ) or DEFAULT_ENDPOINT
    endpoint = without_user_info(given)
    try:
        if chosen == "grpc":
            # Closing a gRPC channel cancels its calls; gRPC itself has a deadline for a whole call
            # and takes no answer above 4 MiB.
            exporter = resolve_name(names.grpc)(endpoint=given)
            return Transport(f"{endpoint} (gRPC)", exporter, rejected_answers(exporter))
        from stagescope.exporters.otlp.http_session import CheckedSession

        session = CheckedSession(
            resolve_name(names.answer),
            resolve_name(names.request) if chosen == "http/json" else None,
        )
        exporter = resolve_name(names.http)(endpoint=http_url(signal, environ), session=session)
        return Transport(
            f"{endpoint} (HTTP)", exporter, lambda: session.rejected, session.shut
        )  # fmt: skip
    except (ValueError, KeyError, OSError, RuntimeError) as problem:
        raise UsageError(
            f"the OTLP exporter ({chosen}) refuses an OTEL_EXPORTER_OTLP_* variable: {problem}"
        ) from problem


def without_user_info(url: str) -> str:
    """Return *url* without user name and password: it is logged."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def rejected_answers(exporter: Any) -> Callable[[], int]:
    """Return a function that says how many the newest answer to *exporter* did not take.

    Its stub is private; where a release has another, rejected spans go unnoticed.
    """
    answers: deque[Any] = deque(maxlen=1)
    inner: Any = getattr(exporter, "_stub", None)

    def rejected() -> int:
        partial = getattr(answers[-1], "partial_success", None) if answers else None
        counts = (getattr(partial, f"rejected_{what}", 0) for what in ("spans", "data_points"))
        return max(0, *counts)

    def stub(channel: Any) -> Any:
        client: Any = inner(channel)
        export = client.Export

        def kept(*args: Any, **kwargs: Any) -> Any:
            answers.clear()
            answers.append(export(*args, **kwargs))
            return answers[-1]

        client.Export = kept
        return client

    if callable(inner):
        exporter._stub = stub
        if getattr(exporter, "_client", None) is not None:
            exporter._client = stub(exporter._channel)
    return rejected


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
