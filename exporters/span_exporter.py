"""OpenTelemetry's own span exporters, as the standard `OTEL_*` variables ask for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan

from stagescope.exporters.otlp_environment import CONSOLE, TRACES, exporter_asked_for
from stagescope.exporters.outlets import ClosingOutlet, Exporter, Outlet, otlp_outlet

Spans = list[ReadableSpan]


def span_outlet_from_environment(environ: Mapping[str, str] = os.environ) -> Outlet[Spans] | None:
    """Give the outlet that the `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError for a value that cannot be used.
    """
    exporter = exporter_asked_for(TRACES, environ)
    if not exporter:
        return None
    return _console() if exporter == CONSOLE else otlp_outlet(TRACES, _grpc, _http, environ)


def _grpc() -> Exporter[Spans]:
    from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter()


def _http(session: Any) -> Exporter[Spans]:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    return OTLPSpanExporter(session=session)


def _console() -> Outlet[Spans]:
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter

    exporter: Exporter[Spans] = ConsoleSpanExporter()
    return ClosingOutlet("the console", exporter)
