"""Sends metrics by OTLP now and then, from a thread of its own; nothing ever waits for it."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope

from stagescope import semconv as names
from stagescope.exporters.aggregation import DURATION_BOUNDS_S, SIZE_BOUNDS, Labels, Snapshot
from stagescope.exporters.otlp.environment import METRICS, whole
from stagescope.exporters.otlp.sending import Sender
from stagescope.exporters.otlp.transport import Transport, transport_from_environment
from stagescope.exporters.prometheus import StageMetrics
from stagescope.exporters.sample_series import Series, Shown
from stagescope.records import Record
from stagescope.samples import LEVEL, SampleName

AGENT_SERVICE: Final = "stagescope-agent"
"""The service of what is of no served process: the host, devices, the agent itself."""
HISTOGRAMS: Final = tuple(metric for metric in names.METRICS if metric.type == "histogram")

_ATTRIBUTES: Final = {
    "method": names.HTTP_REQUEST_METHOD,
    "route": names.HTTP_ROUTE,
    "status": names.STATUS_CLASS,
    "stage": names.STAGE,
    "sub_stage": names.STAGE,
    "worker": names.PROCESS_PID,
    "model": names.MODEL,
    "cause": names.WAIT_CAUSE,
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
        """Return all of it."""
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


INTERVAL_VARIABLE: Final = "OTEL_METRIC_EXPORT_INTERVAL"
INTERVAL_MS: Final = 60_000


def otlp_metrics_from_environment(
    metrics: StageMetrics, shown: Callable[[], Shown], environ: Mapping[str, str] = os.environ
) -> OtlpMetrics | None:
    """Return the sink that the standard `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError, which names the variable, for a value that cannot be used.
    """
    interval_s = whole(environ, INTERVAL_VARIABLE, INTERVAL_MS) / 1000
    transport: Transport[MetricsData] | None = transport_from_environment(METRICS, environ)
    return OtlpMetrics(transport, metrics, shown, interval_s) if transport else None


class OtlpMetrics(Sender[MetricsData]):
    """A sink that takes no records: it sends what *metrics* counted and the samples *shown*.

    Each sending has everything as it is then; one that fails loses its points, which is counted,
    and the next one says more. Nothing is kept to be sent again.
    """

    def __init__(
        self,
        transport: Transport[MetricsData],
        metrics: StageMetrics,
        shown: Callable[[], Shown],
        interval_s: float,
    ) -> None:
        super().__init__(transport, "metrics", " (OTEL_METRICS_EXPORTER=none sends none)")
        self.accepted = 0
        self._metrics = metrics
        self._shown = shown
        self._interval_s = interval_s
        self._since_wall_ns = time.time_ns()
        asked = OTELResourceDetector().detect().attributes.items()
        self._resource = {names.HOST_NAME: socket.gethostname()} | {
            key: str(value) for key, value in asked
        }
        self._points = 0
        """Of the newest sending."""
        self._counts = {"sent_points": 0, "unsent_points": 0}
        self.start()

    @property
    def settled(self) -> int:
        """All that was accepted: nothing waits here."""
        return self.accepted

    def accept(self, records: Sequence[Record]) -> None:
        """Note that there were *records*: they are counted elsewhere, and sent as metrics."""
        self.accepted += len(records)

    def counters(self) -> dict[str, int]:
        """Return points sent and not sent, and sendings that failed; all of them only grow.

        Not by the name of a loss: no record of a load run is missing for these.
        """
        return self._counts | {"failed_exports": self.failed_exports}

    def close(self, timeout_s: float) -> None:
        """Send once more, for at most *timeout_s*, and end the thread."""
        self.end(timeout_s)

    def work(self) -> None:
        """Send at each interval, and once at the end unless the back end fails."""
        while not self.closing.wait(self._interval_s):
            self.send(self._gathered, self._settle)
        if not self.failures:
            self.send(self._gathered, self._settle)

    def _settle(self, sent: bool) -> None:
        rejected = min(self._points, self.transport.rejected()) if sent else self._points
        self._counts["sent_points"] += self._points - rejected
        self._counts["unsent_points"] += rejected
        self._points = 0

    def _gathered(self) -> MetricsData | None:
        moment = Moment(time.time_ns(), time.monotonic_ns(), self._since_wall_ns)
        builder = MetricsBuilder(moment, self._resource)
        for named in HISTOGRAMS:
            builder.add_histograms(named, self._metrics.snapshot(named.name))
        builder.add_series(self._shown().series)
        self._points = builder.points
        return builder.data() if builder.points else None
