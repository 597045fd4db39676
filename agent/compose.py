"""Which sinks an agent feeds: metrics always, OTLP where the environment or the user names one."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from stagescope.agent.control import Render
from stagescope.agent.sinks import Sink

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
EXPORTER_VARIABLE = "OTEL_TRACES_EXPORTER"


@dataclass(frozen=True, slots=True)
class Composed:
    """Sinks by name, and what serves their metrics."""

    render: Render | None
    sinks: dict[str, Sink] = field(default_factory=dict)


def wants_otlp(environment: Mapping[str, str]) -> bool:
    """Tell whether spans go out by OTLP, as the standard OTEL_ variables say."""
    exporters = environment.get(EXPORTER_VARIABLE, "")
    if exporters:
        return "otlp" in [name.strip() for name in exporters.split(",")]
    return any(environment.get(name) for name in _ENDPOINTS)


def sinks_from_environment(
    environment: Mapping[str, str] = os.environ, *, otlp_url: str = ""
) -> Composed:
    """Make the sinks; what a sink needs is imported only where the sink is wanted."""
    from stagescope.exporters.prometheus import StageMetrics

    metrics = StageMetrics()
    sinks: dict[str, Sink] = {"metrics": metrics}
    if otlp_url or wants_otlp(environment):
        from stagescope.exporters import otlp

        sinks["otlp"] = otlp.from_environment(otlp_url)
    return Composed(metrics.render, sinks)
