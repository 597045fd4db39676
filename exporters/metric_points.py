"""Our histograms and samples as OpenTelemetry's metrics, by the names of docs/attributes.md."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from stagescope.exporters import attributes as names
from stagescope.exporters.histograms import DURATION_BOUNDS_S, SIZE_BOUNDS, Snapshot
from stagescope.exporters.sample_series import Series
from stagescope.exporters.service_stats import Labels
from stagescope.samples import LEVEL, SampleName

AGENT_SERVICE: Final = "stagescope-agent"
"""The service of what is of no served process: the host, devices, the agent itself."""
HISTOGRAMS: Final = tuple(metric for metric in names.METRICS if metric.type == "histogram")

_ATTRIBUTES: Final = {
    "method": names.HTTP_REQUEST_METHOD,
    "route": names.HTTP_ROUTE,
    "status": names.STATUS_CLASS,
    "stage": names.STAGE,
    "model": names.MODEL,
    "until": names.COLD_START_UNTIL,
}
"""Of a label of a histogram."""
_CUMULATIVE: Final = AggregationTemporality.CUMULATIVE


@dataclass(frozen=True, slots=True)
class Moment:
    """When it is now, on both clocks, and since when totals are totals."""

    wall_ns: int
    monotonic_ns: int
    since_wall_ns: int


@dataclass(slots=True)
class MetricsBuilder:
    """Gathers metrics by service; `data` gives them as one message."""

    moment: Moment
    resource: Mapping[str, str]
    """What every service's resource has besides its own."""
    points: int = 0
    _of_service: dict[str, list[Metric]] = field(default_factory=dict[str, list[Metric]])

    def add_histograms(self, named: names.MetricName, series: Mapping[Labels, Snapshot]) -> None:
        """Add the histograms of one name; the first of their labels is the service."""
        by_service: dict[str, list[HistogramDataPoint]] = {}
        for (service, *labels), snapshot in series.items():
            if any(snapshot.counts):
                point = self._histogram_point(named, labels, snapshot)
                by_service.setdefault(service, []).append(point)
        for service, points in by_service.items():
            self._add(service, named.name, named.doc, named.unit, Histogram(points, _CUMULATIVE))

    def add_series(self, series: Iterable[Series]) -> None:
        """Add samples: levels as gauges, amounts as sums that only grow."""
        grouped: dict[tuple[str, SampleName], list[NumberDataPoint]] = {}
        for one in series:
            key = one.service or AGENT_SERVICE, one.named
            grouped.setdefault(key, []).append(self._number_point(one))
        for (service, named), points in grouped.items():
            data = Gauge(points) if named.kind == LEVEL else Sum(points, _CUMULATIVE, True)
            self._add(service, named.name, named.doc, named.unit, data)

    def data(self) -> MetricsData:
        """Give all of it."""
        scope = InstrumentationScope("stagescope")
        return MetricsData(
            [
                ResourceMetrics(self._resource(service), [ScopeMetrics(scope, metrics, "")], "")
                for service, metrics in self._of_service.items()
            ]
        )

    def _add(
        self, service: str, name: str, doc: str, unit: str, data: Gauge | Histogram | Sum
    ) -> None:
        self.points += len(data.data_points)
        self._of_service.setdefault(service, []).append(Metric(name, doc, unit, data))

    def _histogram_point(
        self, named: names.MetricName, labels: Iterable[str], snapshot: Snapshot
    ) -> HistogramDataPoint:
        scale, bounds = (1e9, DURATION_BOUNDS_S) if named.unit == "s" else (1.0, SIZE_BOUNDS)
        unknown: Any = None  # they are optional, though not in the class's types
        return HistogramDataPoint(
            attributes=dict(_attributes(named.labels[1:], labels)),
            start_time_unix_nano=self.moment.since_wall_ns,
            time_unix_nano=self.moment.wall_ns,
            count=sum(snapshot.counts),
            sum=snapshot.total / scale,
            bucket_counts=snapshot.counts,
            explicit_bounds=bounds,
            min=unknown,
            max=unknown,
        )

    def _number_point(self, series: Series) -> NumberDataPoint:
        age_ns = self.moment.monotonic_ns - series.newest.end_ns
        level = series.named.kind == LEVEL
        return NumberDataPoint(
            attributes=series.attributes(),
            start_time_unix_nano=self.moment.since_wall_ns,
            time_unix_nano=self.moment.wall_ns - (age_ns if level else 0),
            value=float(series.value),
        )

    def _resource(self, service: str) -> Resource:
        own: dict[str, str] = {
            names.SERVICE_NAME: service,
            names.TELEMETRY_SDK_NAME: "stagescope",
            names.TELEMETRY_SDK_LANGUAGE: "python",
        }
        return Resource({**self.resource, **own})


def _attributes(labels: Iterable[str], values: Iterable[str]) -> Iterator[tuple[str, str]]:
    for label, value in zip(labels, values, strict=True):
        if value:
            yield _ATTRIBUTES[label], value
