"""Counts every record into histograms, and shows them as Prometheus and OpenMetrics text.

Counting is our own, because prometheus_client's histograms cost several microseconds each;
the text is prometheus_client's.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final, TypeVar

from prometheus_client.core import (
    CounterMetricFamily,
    Exemplar,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector, CollectorRegistry

from stagescope import semconv as names
from stagescope.exporters.aggregation import (
    DURATION_BOUNDS_S,
    SIZE_BOUNDS,
    Labels,
    Seen,
    ServiceStats,
    Snapshot,
    Steady,
)
from stagescope.exporters.sample_series import Series, Shown
from stagescope.recorder import format as fmt
from stagescope.records import BatchRecord, ColdStartRecord, Record, RequestRecord, State
from stagescope.samples import LEVEL, SampleName
from stagescope.semconv import prometheus_label, prometheus_name, prometheus_unit
from stagescope.stages import OTHER

MAX_STARTING: Final = 256
"""Processes followed at once until they are steady."""
MAX_SERVICES: Final = 64
"""Services; records of further ones count under the service `other`."""

_METRIC: Final = {metric.name: metric for metric in names.METRICS}
_NOT_IN_A_NAME = re.compile(r"[^a-zA-Z0-9_]+")
_DURATION_EDGES: Final = (*map(repr, DURATION_BOUNDS_S), "+Inf")
_SIZE_EDGES: Final = (*(f"{bound}.0" for bound in SIZE_BOUNDS), "+Inf")


@dataclass(frozen=True, slots=True)
class AgentFigures:
    """What is asked of the agent at each rendering; a figure that is missing is not shown."""

    counters: Callable[[], Mapping[str, float]] = dict
    """Shown as `stagescope_NAME_total`."""
    gauges: Callable[[], Mapping[str, float]] = dict
    """Shown as `stagescope_NAME`."""
    in_flight: Callable[[], Mapping[str, int]] = dict
    """Requests that each service is serving now."""
    waits: Callable[[], Mapping[str, Mapping[str, int]]] = dict
    """What the processes of each service waited for (`recorder_format.WAITS`)."""


class StageMetrics:
    """A sink that counts; gives its text by `render`.

    *has_trace* says whether a request's spans are kept, so that an exemplar leads somewhere;
    None points exemplars at every request. *excluded* says which requests are not counted.
    """

    def __init__(
        self,
        *,
        has_trace: Callable[[RequestRecord], bool] | None = None,
        excluded: Callable[[RequestRecord], bool] = lambda record: False,
        figures: AgentFigures | None = None,
    ) -> None:
        self.accepted = 0
        self.registry = CollectorRegistry(auto_describe=False)
        self.registry.register(StageCollector(self, figures or AgentFigures()))
        self._has_trace = has_trace
        self._excluded = excluded
        self._services: dict[str, ServiceStats] = {}
        self._starting: dict[str, Steady] = {}
        """Processes that are not steady yet, by ring id."""
        self._lock = threading.Lock()

    @property
    def settled(self) -> int:
        """As many as accepted: what is counted is done."""
        return self.accepted

    def accept(self, records: Sequence[Record]) -> None:
        """Count *records*."""
        has_trace = self._has_trace
        with self._lock:
            for record in records:
                stats = self._services.get(record.process.service) or self._new_service(record)
                if isinstance(record, RequestRecord):
                    if self._excluded(record):
                        continue
                    stats.add_request(record, has_trace=has_trace is None or has_trace(record))
                    if self._starting and not record.profiled:
                        self._follow_start(stats, record)
                elif isinstance(record, BatchRecord):
                    stats.add_batch(record)
                else:
                    stats.add_cold_start(record)
                    self._begin_start(record)
            self.accepted += len(records)

    def _begin_start(self, record: ColdStartRecord) -> None:
        if record.state is State.FINISHED and len(self._starting) < MAX_STARTING:
            self._starting[record.process.ring_id] = Steady(record)

    def _follow_start(self, stats: ServiceStats, record: RequestRecord) -> None:
        ring_id = record.process.ring_id
        steady = self._starting.get(ring_id)
        if steady is None:
            return
        steady_ns = steady.add(record)
        if steady_ns is not None:
            stats.add_until("steady", steady_ns)
        if steady_ns is not None or steady.given_up or record.state is State.DIED:
            del self._starting[ring_id]

    def counters(self) -> dict[str, int]:
        """Return nothing: what was counted is in the text, and nothing is ever dropped."""
        return {}

    def close(self, timeout_s: float) -> None:
        """Nothing waits here."""

    def stalls(self) -> dict[tuple[str, str, str], int]:
        """Return nanoseconds by service, stage and cause."""
        with self._lock:
            return {
                (service, *labels): spent
                for service, stats in self._services.items()
                for labels, spent in stats.stalls().items()
            }

    def profiled(self) -> dict[str, int]:
        """Return the requests that overlap a capture, by service."""
        with self._lock:
            return {service: stats.profiled for service, stats in self._services.items()}

    def render(self, accept: str = "") -> tuple[bytes, str]:
        """Return the text in the format that an `Accept` header asks for, and its content type."""
        encode, content_type = choose_encoder(accept.lower())  # RFC 9110, 8.3.1: in any case
        return encode(self.registry), content_type

    def snapshot(self, metric: str) -> dict[Labels, Snapshot]:
        """Copy the histograms of *metric* (a name of attributes.METRICS) by their labels."""
        with self._lock:
            return {
                (service, *labels): histogram.snapshot()
                for service, stats in self._services.items()
                for labels, histogram in stats.series(metric)
            }

    def _new_service(self, record: Record) -> ServiceStats:
        full = len(self._services) >= MAX_SERVICES
        return self._services.setdefault(OTHER if full else record.process.service, ServiceStats())


class StageCollector(Collector):
    """What prometheus_client asks for the metrics of a `StageMetrics`."""

    def __init__(self, metrics: StageMetrics, figures: AgentFigures) -> None:
        self._metrics = metrics
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Yield every family, histograms first."""
        for name in (
            names.METRIC_REQUEST_DURATION,
            names.METRIC_STAGE_DURATION,
            names.METRIC_SUB_STAGE_DURATION,
            names.METRIC_STAGE_OWN,
            names.METRIC_STAGE_WAIT,
            names.METRIC_WORKER_DURATION,
            names.METRIC_BATCH_DURATION,
            names.METRIC_BATCH_SIZE,
            names.METRIC_COLD_START,
            names.METRIC_COLD_START_STAGE,
        ):
            yield _histogram_family(_METRIC[name], self._metrics.snapshot(name))
        yield self._active_requests()
        yield self._stage_stalls()
        yield self._profiled_requests()
        yield from self._process_waits()
        for make, figures in (
            (CounterMetricFamily, self._figures.counters()),
            (GaugeMetricFamily, self._figures.gauges()),
        ):
            for name, value in sorted(figures.items()):
                if name not in fmt.WAITS:  # Those are `model_server_process_*`.
                    yield _own_family(make, name, value)

    def _active_requests(self) -> Metric:
        family = _empty(GaugeMetricFamily, _METRIC[names.METRIC_ACTIVE_REQUESTS])
        for service, requests in islice(self._figures.in_flight().items(), MAX_SERVICES):
            family.add_metric((service,), requests)
        return family

    def _stage_stalls(self) -> Metric:
        family = _empty(CounterMetricFamily, _METRIC[names.METRIC_STAGE_STALL])
        for labels, spent_ns in self._metrics.stalls().items():
            family.add_metric(labels, spent_ns / 1e9)
        return family

    def _profiled_requests(self) -> Metric:
        family = _empty(CounterMetricFamily, _METRIC[names.METRIC_PROFILED])
        for service, requests in self._metrics.profiled().items():
            family.add_metric((service,), requests)
        return family

    def _process_waits(self) -> Iterator[Metric]:
        waits = list(islice(self._figures.waits().items(), MAX_SERVICES))
        for name, kind, unit, _ in names.PROCESS_WAITS:
            make: Callable[..., CounterMetricFamily | GaugeMetricFamily] = (
                CounterMetricFamily if kind == "counter" else GaugeMetricFamily
            )
            family = _empty(make, _METRIC[f"model_server.process.{name}"])
            for service, figures in waits:
                value = figures.get(names.WAIT_SECONDS.get(name, name), 0)
                family.add_metric((service,), value / 1e9 if unit == "s" else value)
            yield family


F = TypeVar("F")


def _empty(kind: Callable[..., F], named: names.MetricName) -> F:
    unit = "seconds" if named.unit == "s" else ""
    return kind(named.prometheus, named.doc, labels=named.labels, unit=unit)


def _histogram_family(
    named: names.MetricName, series: Mapping[Labels, Snapshot]
) -> HistogramMetricFamily:
    scale, bounds = (1e9, _DURATION_EDGES) if named.unit == "s" else (1.0, _SIZE_EDGES)
    family = _empty(HistogramMetricFamily, named)
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


_SECONDS: Final = {"_ns": 1e9, "_s": 1.0}
"""Ending of a count's name, and what makes seconds of it: Prometheus's base unit."""


def _own_family(
    make: type[CounterMetricFamily | GaugeMetricFamily], name: str, value: float
) -> Metric:
    for ending, scale in _SECONDS.items():
        if name.endswith(ending):
            return make(
                f"{_own_name(name.removesuffix(ending))}_seconds",
                _own_doc(name),
                value=value / scale,
            )
    return make(_own_name(name), _own_doc(name), value=value)


def _own_name(name: str) -> str:
    return f"stagescope_{_NOT_IN_A_NAME.sub('_', name).strip('_')}"


def _own_doc(name: str) -> str:
    return f"stagescope's own count: {name}."


# Samples, and what each collector costs, as Prometheus metrics.
#
# Names are made from OpenTelemetry's as its specification says
# (https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/).


_LABELS: Final = {
    names.PROCESS_PID: "pid",
    names.HARDWARE_ID: "device",
    names.STAGE: "stage",
}
"""Attributes whose label is shorter than their name, as in our other metrics."""
_COLLECTOR_METRIC: Final = {metric.name: metric for metric in names.COLLECTOR_METRICS}


class SampleCollector(Collector):
    """What prometheus_client asks for samples; asks *shown* at each scrape."""

    def __init__(self, shown: Callable[[], Shown]) -> None:
        self._shown = shown

    def collect(self) -> Iterator[Metric]:
        """Yield a family for each name that there is a sample of."""
        now = self._shown()
        by_name: dict[SampleName, list[Series]] = {}
        for series in now.series:
            by_name.setdefault(series.named, []).append(series)
        for named, of_name in by_name.items():
            yield _family(named, of_name)
        left_out = _COLLECTOR_METRIC[names.METRIC_SERIES_LEFT_OUT]
        yield GaugeMetricFamily(left_out.prometheus, left_out.doc, value=now.left_out)


class CostCollector(Collector):
    """What prometheus_client asks for the cost of the agent's collectors."""

    def __init__(self, costs: Callable[[], Mapping[str, Mapping[str, float]]]) -> None:
        self._costs = costs

    def collect(self) -> Iterator[Metric]:
        """Yield calls, lateness and the longest call, by collector; CPU time is a sample."""
        calls = _empty(CounterMetricFamily, _COLLECTOR_METRIC[names.METRIC_COLLECTOR_CALLS])
        late = _empty(CounterMetricFamily, _COLLECTOR_METRIC[names.METRIC_COLLECTOR_LATE])
        longest = _empty(GaugeMetricFamily, _COLLECTOR_METRIC[names.METRIC_COLLECTOR_LONGEST])
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
