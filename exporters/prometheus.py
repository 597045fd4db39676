"""Counts every record into histograms, and shows them as Prometheus and OpenMetrics text.

Counting is our own, because prometheus_client's histograms cost several microseconds each;
the text is prometheus_client's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from stagescope.exporters import attributes as names
from stagescope.exporters.histograms import SIZE_BOUNDS, Histogram, Seen, Snapshot
from stagescope.exporters.spans import known_method
from stagescope.records import BatchRecord, Record, RequestRecord
from stagescope.stages import OTHER, stage_of

MAX_STAGES: Final = 48
"""Stage names of one service, its own among them; time in further ones counts as `other`."""
MAX_ROUTES: Final = 200
"""Routes of one service; requests to further ones count under the route `other`."""
MAX_MODELS: Final = 64
"""Models of one service; batches of further ones count under the model `other`."""
MAX_SERVICES: Final = 64
"""Services; records of further ones count under the service `other`."""

_STATUS_CLASSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")
_METRIC: Final = {metric.name: metric for metric in names.METRICS}
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]+")

Labels = tuple[str, ...]


class ServiceStats:
    """The histograms of one service."""

    __slots__ = ("batch_seconds", "batch_sizes", "models", "requests", "routes", "stages", "tops")

    def __init__(self) -> None:
        self.tops: dict[str, str] = {OTHER: OTHER}
        """Full stage name to the name it is counted under."""
        self.stages: dict[str, Histogram] = {OTHER: Histogram()}
        self.routes: dict[str, str] = {"": ""}
        self.requests: dict[tuple[str, str, int], Histogram] = {}
        self.models: dict[str, str] = {}
        self.batch_sizes: dict[str, Histogram] = {}
        self.batch_seconds: dict[str, Histogram] = {}

    def top(self, stage: str) -> str:
        """Give the name under which *stage* is counted, for a name not met before."""
        top = stage_of(stage)
        if top not in self.stages:
            if len(self.stages) >= MAX_STAGES:
                return OTHER  # not remembered: names without end would fill the memory
            self.stages[top] = Histogram()
        if len(self.tops) < 4 * MAX_STAGES:
            self.tops[stage] = top
        return top


class StageMetrics:
    """A sink that counts; gives its text by `render`.

    *has_trace* tells whether a request's spans are kept, so that an exemplar leads somewhere;
    None points exemplars at every request. *counters* and *gauges* are asked at each rendering
    and appear as `stagescope_NAME_total` and `stagescope_NAME`.
    """

    def __init__(
        self,
        *,
        has_trace: Callable[[RequestRecord], bool] | None = None,
        counters: Callable[[], Mapping[str, float]] = dict,
        gauges: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self.accepted = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(StageCollector(self, counters, gauges))
        self._has_trace = has_trace
        self._services: dict[str, ServiceStats] = {}
        self._in_flight: dict[str, int] = {}
        self._lock = threading.Lock()

    @property
    def settled(self) -> int:
        """As many as accepted: what is counted is done."""
        return self.accepted

    def accept(self, records: Sequence[Record]) -> None:
        """Count *records*."""
        with self._lock:
            for record in records:
                stats = self._services.get(record.process.service) or self._new_service(record)
                if isinstance(record, RequestRecord):
                    self._count_request(record, stats)
                else:
                    _count_batch(record, stats)
            self.accepted += len(records)

    def counters(self) -> dict[str, int]:
        """Give nothing: what was counted is in the text, and nothing is ever dropped."""
        return {}

    def close(self, timeout_s: float) -> None:
        """Nothing waits here."""

    def set_in_flight(self, service: str, requests: int) -> None:
        """Say how many *requests* of *service* are in flight now."""
        with self._lock:
            if service in self._in_flight or len(self._in_flight) < MAX_SERVICES:
                self._in_flight[service] = requests

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Give the text in the format that an `Accept` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept)
        return encode(self.registry), content_type

    def in_flight(self) -> dict[str, int]:
        """Give the requests in flight by service."""
        with self._lock:
            return dict(self._in_flight)

    def snapshot(self, metric: str) -> dict[Labels, Snapshot]:
        """Copy the histograms of *metric* (a name of attributes.METRICS) by their labels."""
        with self._lock:
            return {
                (service, *labels): histogram.snapshot()
                for service, stats in self._services.items()
                for labels, histogram in _series(stats, metric)
            }

    def _new_service(self, record: Record) -> ServiceStats:
        full = len(self._services) >= MAX_SERVICES
        return self._services.setdefault(OTHER if full else record.process.service, ServiceStats())

    def _count_request(self, record: RequestRecord, stats: ServiceStats) -> None:
        rest = duration = record.duration_ns
        tops, sums = stats.tops, dict[str, int]()
        for stage, _, _, self_ns, _, _ in record.stages:
            top = tops.get(stage) or stats.top(stage)
            sums[top] = sums.get(top, 0) + self_ns
            rest -= self_ns
        sums[OTHER] = sums.get(OTHER, 0) + rest
        request = _request_histogram(record, stats)
        if self._has_trace is None or self._has_trace(record):
            _add_with_exemplars(record, request, stats.stages, sums)
            return
        request.add(duration)
        histograms = stats.stages
        for top, spent in sums.items():
            histograms[top].add(spent)


def _add_with_exemplars(
    record: RequestRecord, request: Histogram, stages: dict[str, Histogram], sums: dict[str, int]
) -> None:
    trace, span, duration = record.trace_id, record.span_id, record.duration_ns
    wall = record.process.anchor.wall(record.start_ns + duration)
    request.exemplars[request.add(duration)] = Seen(trace, span, duration, wall)
    for top, spent in sums.items():
        histogram = stages[top]
        histogram.exemplars[histogram.add(spent)] = Seen(trace, span, spent, wall)


def _request_histogram(record: RequestRecord, stats: ServiceStats) -> Histogram:
    key = record.method, record.route, record.status // 100
    histogram = stats.requests.get(key)
    if histogram is None:
        route = _bounded(stats.routes, record.route, MAX_ROUTES)
        status = key[2] if key[2] < len(_STATUS_CLASSES) else 5
        key = known_method(record.method), route, status
        histogram = stats.requests.setdefault(key, Histogram())
    return histogram


def _bounded(known: dict[str, str], name: str, most: int) -> str:
    if name in known:
        return name
    if len(known) >= most:
        return OTHER
    known[name] = name
    return name


def _count_batch(record: BatchRecord, stats: ServiceStats) -> None:
    model = _bounded(stats.models, record.model, MAX_MODELS)
    sizes = stats.batch_sizes.get(model)
    if sizes is None:
        sizes = stats.batch_sizes[model] = Histogram(SIZE_BOUNDS)
        stats.batch_seconds[model] = Histogram()
    sizes.add(record.size)
    stats.batch_seconds[model].add(record.duration_ns)


def _series(stats: ServiceStats, metric: str) -> Iterator[tuple[Labels, Histogram]]:
    match metric:
        case names.METRIC_REQUEST_DURATION:
            for (method, route, status), histogram in stats.requests.items():
                yield (method, route, _STATUS_CLASSES[status]), histogram
        case names.METRIC_STAGE_DURATION:
            for stage, histogram in stats.stages.items():
                yield (stage,), histogram
        case names.METRIC_BATCH_SIZE:
            for model, histogram in stats.batch_sizes.items():
                yield (model,), histogram
        case names.METRIC_BATCH_DURATION:
            for model, histogram in stats.batch_seconds.items():
                yield (model,), histogram


class StageCollector(Collector):
    """What prometheus_client asks for the metrics of a `StageMetrics`."""

    def __init__(
        self,
        metrics: StageMetrics,
        counters: Callable[[], Mapping[str, float]],
        gauges: Callable[[], Mapping[str, float]],
    ) -> None:
        self._metrics = metrics
        self._counters = counters
        self._gauges = gauges

    def collect(self) -> Iterator[Metric]:
        """Give every family, histograms first."""
        for name in (
            names.METRIC_REQUEST_DURATION,
            names.METRIC_STAGE_DURATION,
            names.METRIC_BATCH_DURATION,
            names.METRIC_BATCH_SIZE,
        ):
            yield _histogram_family(_METRIC[name], self._metrics.snapshot(name))
        yield self._active_requests()
        for name, count in sorted(self._counters().items()):
            yield CounterMetricFamily(_own_name(name), _own_doc(name), value=count)
        for name, value in sorted(self._gauges().items()):
            yield GaugeMetricFamily(_own_name(name), _own_doc(name), value=value)

    def _active_requests(self) -> Metric:
        named = _METRIC[names.METRIC_ACTIVE_REQUESTS]
        family = GaugeMetricFamily(named.prometheus, named.doc, labels=named.labels)
        for service, requests in self._metrics.in_flight().items():
            family.add_metric((service,), requests)
        return family


def _histogram_family(
    named: names.MetricName, series: Mapping[Labels, Snapshot]
) -> HistogramMetricFamily:
    seconds = named.unit == "s"
    scale, bounds = (1e9, _DURATION_EDGES) if seconds else (1.0, _SIZE_EDGES)
    family = HistogramMetricFamily(
        named.prometheus, named.doc, labels=named.labels, unit="seconds" if seconds else ""
    )
    for labels, snapshot in series.items():
        if any(snapshot.counts):
            family.add_metric(
                labels, list(_buckets(snapshot, bounds, scale)), snapshot.total / scale
            )
    return family


def _buckets(snapshot: Snapshot, edges: Sequence[str], scale: float) -> Iterator[Any]:
    below = 0
    for edge, count, seen in zip(edges, snapshot.counts, snapshot.exemplars, strict=True):
        below += count
        yield (edge, below, _exemplar(seen, scale)) if seen else (edge, below)


def _exemplar(seen: Seen, scale: float) -> Exemplar:
    ids = {"trace_id": seen.trace_id, "span_id": seen.span_id}
    return Exemplar(ids, seen.value / scale, seen.wall_ns / 1e9)


def _own_name(name: str) -> str:
    return f"stagescope_{_NOT_IN_A_NAME.sub('_', name).strip('_')}"


def _own_doc(name: str) -> str:
    return f"stagescope's own count: {name}."


def _edges(bounds: Sequence[int], scale: float) -> tuple[str, ...]:
    return (*(repr(bound / scale) for bound in bounds), "+Inf")


_DURATION_EDGES = _edges(Histogram().bounds, 1e9)
_SIZE_EDGES = _edges(SIZE_BOUNDS, 1.0)
