"""OpenTelemetry's own metric exporters, as the standard `OTEL_*` variables ask for them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from opentelemetry.sdk.metrics.export import MetricsData

from stagescope.exporters.otlp_environment import CONSOLE, METRICS, exporter_asked_for
from stagescope.exporters.outlets import ClosingOutlet, Exporter, Outlet, otlp_outlet


def metric_outlet_from_environment(
    environ: Mapping[str, str] = os.environ,
) -> Outlet[MetricsData] | None:
    """Give the outlet that the `OTEL_*` variables ask for; None where they ask for none.

    `OTEL_METRICS_EXPORTER=prometheus` is what we do anyway. Raises UsageError for a value that
    cannot be used.
    """
    exporter = exporter_asked_for(METRICS, environ, served_anyway=("prometheus",))
    if not exporter:
        return None
    return _console() if exporter == CONSOLE else otlp_outlet(METRICS, _grpc, _http, environ)


def _grpc() -> Exporter[MetricsData]:
    from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter()


def _http(session: Any) -> Exporter[MetricsData]:
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter

    return OTLPMetricExporter(session=session)


def _console() -> Outlet[MetricsData]:
    from opentelemetry.sdk.metrics.export import ConsoleMetricExporter

    exporter: Exporter[MetricsData] = ConsoleMetricExporter()
    return ClosingOutlet("the console", exporter)
