"""Samples, and what each collector costs, as Prometheus metrics.

Names are made from OpenTelemetry's as its specification says
(https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from stagescope.exporters import attributes as names
from stagescope.exporters.attributes import prometheus_label, prometheus_name, prometheus_unit
from stagescope.exporters.sample_series import Series, Shown
from stagescope.samples import LEVEL, SampleName

_LABELS: Final = {
    names.PROCESS_PID: "pid",
    names.HARDWARE_ID: "device",
    names.STAGE: "stage",
}
"""Attributes whose label is shorter than their name, as in our other metrics."""
_METRIC: Final = {metric.name: metric for metric in names.COLLECTOR_METRICS}


class SampleCollector(Collector):
    """What prometheus_client asks for samples; asks *shown* at each scrape."""

    def __init__(self, shown: Callable[[], Shown]) -> None:
        self._shown = shown

    def collect(self) -> Iterator[Metric]:
        """Give a family for each name that there is a sample of."""
        now = self._shown()
        by_name: dict[SampleName, list[Series]] = {}
        for series in now.series:
            by_name.setdefault(series.named, []).append(series)
        for named, of_name in by_name.items():
            yield _family(named, of_name)
        left_out = _METRIC[names.METRIC_SERIES_LEFT_OUT]
        yield GaugeMetricFamily(left_out.prometheus, left_out.doc, value=now.left_out)


class CostCollector(Collector):
    """What prometheus_client asks for the cost of the agent's collectors."""

    def __init__(self, costs: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        self._costs = costs

    def collect(self) -> Iterator[Metric]:
        """Give calls, lateness and the longest call, by collector; CPU time is a sample."""
        named = _METRIC[names.METRIC_COLLECTOR_CALLS]
        calls = CounterMetricFamily(named.prometheus, named.doc, labels=named.labels)
        named = _METRIC[names.METRIC_COLLECTOR_LATE]
        late = CounterMetricFamily(named.prometheus, named.doc, labels=named.labels, unit="seconds")
        named = _METRIC[names.METRIC_COLLECTOR_LONGEST]
        longest = GaugeMetricFamily(
            named.prometheus, named.doc, labels=named.labels, unit="seconds"
        )
        for name, cost in self._costs().items():
            calls.add_metric((name,), cost["calls"])
            late.add_metric((name,), cost["late_s"])
            longest.add_metric((name,), cost["longest_s"])
        yield from (calls, late, longest)


def _family(named: SampleName, series: Iterable[Series]) -> Metric:
    name, unit = prometheus_name(named), prometheus_unit(named)
    kind = GaugeMetricFamily if named.kind == LEVEL else CounterMetricFamily
    family = kind(name, named.doc, unit=unit)
    suffix = "" if named.kind == LEVEL else "_total"
    for one in series:
        # Not by add_metric: a label that a series has no value of is left out, not empty.
        family.add_sample(f"{name}{suffix}", _labels(one), one.value)
    return family


def _labels(series: Series) -> dict[str, str]:
    labels = {"service": series.service} if series.service else {}
    for name, value in series.attributes().items():
        labels[_LABELS.get(name) or prometheus_label(name)] = str(value)
    return labels
