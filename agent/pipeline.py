"""Which sinks an agent feeds: metrics always, OTLP where the environment or the user names one.

By OTLP go spans and metrics, each where it is asked for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from stagescope.agent.context import AgentFigures
from stagescope.agent.overhead import COUNTERS_OF
from stagescope.agent.sinks import Sink
from stagescope.errors import UsageError
from stagescope.exporters.otlp.environment import (
    CONSOLE,
    METRICS,
    OTLP,
    TRACES,
    exporter_asked_for,
)

if TYPE_CHECKING:
    from stagescope.exporters.otlp.metrics import OtlpMetrics
    from stagescope.exporters.otlp.sender import OtlpSpans
    from stagescope.exporters.prometheus import StageMetrics
    from stagescope.exporters.sample_series import Shown

ENDPOINT_VARIABLE = "OTEL_EXPORTER_OTLP_ENDPOINT"

_log = logging.getLogger("stagescope")

T = TypeVar("T")

Render = Callable[[str], tuple[bytes, str]]
"""Takes an `Accept` header, gives metrics as text and its content type."""


class Pipeline:
    """The sinks of an agent, by name, and its metrics as text."""

    def __init__(self, metrics: StageMetrics, sinks: dict[str, Sink]) -> None:
        self.sinks = sinks
        self._metrics = metrics
        self._agent: AgentFigures | None = None

    def watch(self, agent: AgentFigures) -> None:
        """Show *agent*'s own numbers in the metrics too."""
        self._agent = agent

    def counters(self) -> Mapping[str, float]:
        """Return the agent's numbers that only grow; those of collectors are in `costs`."""
        if not self._agent:
            return {}
        counters = self._agent.counters().items()
        return {name: n for name, n in counters if not name.startswith(COUNTERS_OF)}

    def costs(self) -> Mapping[str, Mapping[str, float]]:
        """Return what each of the agent's collectors has cost."""
        return self._agent.costs() if self._agent else {}

    def shown(self) -> Shown:
        """Return the series of samples that are metrics now."""
        from stagescope.exporters.sample_series import Shown, shown

        if not self._agent:
            return Shown()
        services = {process.pid: process.service for _, process in self._agent.alive()}
        return shown(self._agent.evidence.samples.latest(0), services, time.monotonic_ns())

    def gauges(self) -> Mapping[str, float]:
        """Return the agent's numbers that come and go."""
        return self._agent.gauges() if self._agent else {}

    def render(self, accept: str) -> tuple[bytes, str]:
        """Return all metrics in the format that an `Accept` header asks for."""
        if self._agent:
            for service, requests in self._agent.in_flight().items():
                self._metrics.set_in_flight(service, requests)
            for service, waits in self._agent.waits().items():
                self._metrics.set_waits(service, waits)
        return self._metrics.render(accept)


def sinks_from_environment(environment: Mapping[str, str] = os.environ) -> Pipeline:
    """Make the sinks; what a sink needs is imported only where the sink is wanted.

    The `OTEL_*` variables are the app's too, and may have values that are right for it and not
    supported here: that turns off the one sink that reads them, with a line in the log.
    """
    from stagescope.exporters.prometheus import CostCollector, SampleCollector, StageMetrics

    spans = _or_off("spans", lambda: _spans(environment))
    metrics = StageMetrics(
        has_trace=spans.certain if spans else None,
        counters=lambda: composed.counters(),
        gauges=lambda: composed.gauges(),
    )
    composed = Pipeline(metrics, {"metrics": metrics})
    metrics.registry.register(SampleCollector(composed.shown))
    metrics.registry.register(CostCollector(composed.costs))
    if spans:
        composed.sinks["otlp"] = spans
    sent = _or_off("metrics", lambda: _sent_metrics(metrics, composed.shown, environment))
    if sent:
        composed.sinks["otlp_metrics"] = sent
    return composed


def sends_by_otlp_alone(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether spans or metrics are sent by OTLP and none are printed, by the environment."""
    asked = {_asked(signal, environment) for signal in (TRACES, METRICS)}
    return OTLP in asked and CONSOLE not in asked


def _asked(signal: str, environment: Mapping[str, str]) -> str:
    try:
        return exporter_asked_for(signal, environment)
    except UsageError:  # the sink is off, and says so itself
        return ""


def _or_off(what: str, make: Callable[[], T | None]) -> T | None:
    try:
        return make()
    except UsageError as problem:
        _log.warning("no %s are sent by OTLP: %s; all else goes on", what, problem)
        return None


def _sent_metrics(
    metrics: StageMetrics, shown: Callable[[], Shown], environment: Mapping[str, str]
) -> OtlpMetrics | None:
    if not exporter_asked_for(METRICS, environment):
        return None  # and nothing of OpenTelemetry is imported
    from stagescope.exporters.otlp.metrics import otlp_metrics_from_environment

    return otlp_metrics_from_environment(metrics, shown, environment)


def _spans(environment: Mapping[str, str]) -> OtlpSpans | None:
    if not exporter_asked_for(TRACES, environment):
        return None
    from stagescope.exporters.otlp.sender import otlp_from_environment

    return otlp_from_environment()
