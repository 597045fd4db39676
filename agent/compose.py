"""Which sinks an agent feeds: metrics always, OTLP where the environment or the user names one."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from stagescope.agent.sinks import Sink

if TYPE_CHECKING:
    from stagescope.agent.loop import Agent
    from stagescope.exporters.otlp import OtlpSpans
    from stagescope.exporters.prometheus import StageMetrics

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"
_ASKING = (ENDPOINT_VARIABLE, "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_TRACES_EXPORTER")

Render = Callable[[str], tuple[bytes, str]]
"""Takes an `Accept` header, gives metrics as text and its content type."""


class Composed:
    """The sinks of an agent, by name, and its metrics as text."""

    def __init__(self, metrics: StageMetrics, sinks: dict[str, Sink]) -> None:
        self.sinks = sinks
        self._metrics = metrics
        self._agent: Agent | None = None

    def watch(self, agent: Agent) -> None:
        """Show *agent*'s own numbers in the metrics too."""
        self._agent = agent

    def counters(self) -> Mapping[str, float]:
        """Give the agent's numbers that only grow."""
        return self._agent.counters() if self._agent else {}

    def gauges(self) -> Mapping[str, float]:
        """Give the agent's numbers that come and go."""
        return self._agent.gauges() if self._agent else {}

    def render(self, accept: str) -> tuple[bytes, str]:
        """Give all metrics in the format that an `Accept` header asks for."""
        if self._agent:
            for service, requests in self._agent.in_flight().items():
                self._metrics.set_in_flight(service, requests)
            for service, waits in self._agent.waits().items():
                self._metrics.set_waits(service, waits)
        return self._metrics.render(accept)


def sinks_from_environment(environment: Mapping[str, str] = os.environ) -> Composed:
    """Make the sinks; what a sink needs is imported only where the sink is wanted.

    Raises UsageError, which names the variable, for a value that cannot be used.
    """
    from stagescope.exporters.prometheus import StageMetrics

    spans = _spans(environment)
    metrics = StageMetrics(
        has_trace=spans.certain if spans else None,
        counters=lambda: composed.counters(),
        gauges=lambda: composed.gauges(),
    )
    composed = Composed(metrics, {"metrics": metrics})
    if spans:
        composed.sinks["otlp"] = spans
    return composed


def _spans(environment: Mapping[str, str]) -> OtlpSpans | None:
    if not any(environment.get(name) for name in _ASKING):
        return None
    from stagescope.exporters.otlp import otlp_from_environment

    return otlp_from_environment()
