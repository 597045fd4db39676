"""Which sinks an agent feeds: metrics always, OTLP where the environment or the user names one.

By OTLP go spans and metrics, each where it is asked for.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from stagescope.agent.collectors import COUNTERS_OF
from stagescope.agent.context import AgentContext
from stagescope.agent.sinks import Sink
from stagescope.errors import UsageError
from stagescope.exporters.exclusions import Exclusions, exclusions_from_environment
from stagescope.exporters.otlp.environment import (
    CONSOLE,
    METRICS,
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
"""Takes an `Accept` header, returns metrics as text and its content type."""


class Pipeline:
    """The sinks of an agent, by name, and its metrics as text (`render`)."""

    render: Render

    def __init__(self) -> None:
        self.sinks: dict[str, Sink] = {}
        self._agent: AgentContext | None = None

    def watch(self, agent: AgentContext) -> None:
        """Show *agent*'s own numbers in the metrics too."""
        self._agent = agent

    def asked(self, what: str) -> Mapping[str, Any]:
        """Return what the agent's method *what* gives; nothing while there is no agent."""
        return getattr(self._agent, what)() if self._agent else {}

    def counters(self) -> Mapping[str, float]:
        """Return the agent's numbers that only grow; those of collectors are in `costs`."""
        counters = self.asked("counters").items()
        return {name: n for name, n in counters if not name.startswith(COUNTERS_OF)}

    def shown(self) -> Shown:
        """Return the series of samples that are metrics now."""
        from stagescope.exporters.sample_series import Shown, shown

        if not self._agent:
            return Shown()
        services = {process.pid: process.service for _, process in self._agent.alive()}
        return shown(self._agent.evidence.samples.latest(0), services, time.monotonic_ns())


def sinks_from_environment(environment: Mapping[str, str] = os.environ) -> Pipeline:
    """Make the sinks; what a sink needs is imported only where the sink is wanted.

    The `OTEL_*` variables are the app's too, and may have values that are right for it and not
    supported here: that turns off the one sink that reads them, with a line in the log.
    """
    from stagescope.exporters import prometheus

    try:
        excluded = exclusions_from_environment(environment)
    except UsageError as problem:
        _log.warning("no request is excluded: %s", problem)
        excluded = Exclusions()
    spans = _or_off("spans", lambda: _spans(environment, excluded))
    pipeline = Pipeline()
    gauges, in_flight, waits, costs = (
        partial(pipeline.asked, what) for what in ("gauges", "in_flight", "waits", "costs")
    )
    metrics = prometheus.StageMetrics(
        has_trace=spans.certain if spans else None,
        excluded=excluded.no_metric,
        figures=prometheus.AgentFigures(pipeline.counters, gauges, in_flight, waits),
    )
    pipeline.sinks["metrics"], pipeline.render = metrics, metrics.render
    metrics.registry.register(prometheus.SampleCollector(pipeline.shown))
    metrics.registry.register(prometheus.CostCollector(costs))
    if spans:
        pipeline.sinks["otlp"] = spans
    sent = _or_off("metrics", lambda: _sent_metrics(metrics, pipeline.shown, environment))
    if sent:
        pipeline.sinks["otlp_metrics"] = sent
    return pipeline


def prints(environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether spans or metrics are printed to this process's output, by the environment."""
    return CONSOLE in {_asked(signal, environment) for signal in (TRACES, METRICS)}


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


def _spans(environment: Mapping[str, str], excluded: Exclusions) -> OtlpSpans | None:
    if not exporter_asked_for(TRACES, environment):
        return None
    from stagescope.exporters.otlp.sender import otlp_from_environment
    from stagescope.exporters.tail_sampling import TailSampler

    return otlp_from_environment(TailSampler(excluded=excluded))
