"""Counts the records of one service, with a bound on every name that a client or user can invent."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from stagescope.exporters import attributes as names
from stagescope.exporters.histograms import SIZE_BOUNDS, Histogram, Seen
from stagescope.exporters.span_attributes import known_method
from stagescope.records import BatchRecord, ColdStartRecord, RequestRecord, State
from stagescope.stages import OTHER, stage_of

MAX_STAGES: Final = 48
"""Stage names, our own among them; time in further ones counts as `other`."""
MAX_ROUTES: Final = 200
"""Routes; requests to further ones count under the route `other`."""
MAX_MODELS: Final = 64
"""Models; batches of further ones count under the model `other`."""

STATUS_CLASSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")

Labels = tuple[str, ...]


class ServiceStats:
    """The histograms of one service."""

    def __init__(self) -> None:
        self._counted_as: dict[str, str] = {OTHER: OTHER}
        """Full stage name to the stage it is counted under."""
        self._stages: dict[str, Histogram] = {OTHER: Histogram()}
        self._routes = {""}
        self._requests: dict[tuple[str, str, int], Histogram] = {}
        self._models: set[str] = set()
        self._batch_sizes: dict[str, Histogram] = {}
        self._batch_seconds: dict[str, Histogram] = {}

        self._stalls: dict[tuple[str, str], int] = {}
        self.profiled = 0
        """Requests that overlap a capture; they are in no histogram."""
        self._cold_starts: dict[str, Histogram] = {}
        self._cold_stages: dict[str, Histogram] = {}

    def add_request(self, record: RequestRecord, *, has_trace: bool) -> None:
        """Count a request; *has_trace* where an exemplar may point at it."""
        if record.stalls and record.profiled:
            self.profiled += 1
            return
        counted_as, spent = self._counted_as, dict[str, int]()
        rest = record.duration_ns
        for name, _, _, self_ns, _, _ in record.stages:
            stage = counted_as.get(name) or self._new_stage(name)
            spent[stage] = spent.get(stage, 0) + self_ns
            rest -= self_ns
        spent[OTHER] = spent.get(OTHER, 0) + rest
        for stall in record.stalls:
            key = counted_as.get(stall.stage) or self._new_stage(stall.stage), stall.cause
            self._stalls[key] = self._stalls.get(key, 0) + stall.stall_ns
        if has_trace:
            self._add_with_exemplars(record, spent)
            return
        self._request_histogram(record).add(record.duration_ns)
        for stage, charged_ns in spent.items():
            self._stages[stage].add(charged_ns)

    def add_batch(self, record: BatchRecord) -> None:
        """Count a batch."""
        model = _bounded(self._models, record.model, MAX_MODELS)
        if model not in self._batch_sizes:
            self._batch_sizes[model] = Histogram(SIZE_BOUNDS)
            self._batch_seconds[model] = Histogram()
        self._batch_sizes[model].add(record.size)
        self._batch_seconds[model].add(record.duration_ns)

    def add_cold_start(self, record: ColdStartRecord) -> None:
        """Count a start: how long until it was ready, and until its first request was answered."""
        if (ready_ns := record.ready_ns()) is not None:
            self.add_until("ready", ready_ns)
        if record.first_request is not None and record.state is State.FINISHED:
            self.add_until("first_request", record.duration_ns)
        spent: dict[str, int] = {}
        for span in record.stages:
            spent[span.stage] = spent.get(span.stage, 0) + span.self_ns
        for stage, charged_ns in spent.items():
            if stage not in self._cold_stages and len(self._cold_stages) >= MAX_STAGES:
                stage = OTHER
            self._cold_stages.setdefault(stage, Histogram()).add(charged_ns)

    def add_until(self, until: str, duration_ns: int) -> None:
        """Count what a cold start took until a point of it."""
        self._cold_starts.setdefault(until, Histogram()).add(duration_ns)

    def stalls(self) -> dict[tuple[str, str], int]:
        """Give nanoseconds by stage and cause."""
        return dict(self._stalls)

    def series(self, metric: str) -> Iterator[tuple[Labels, Histogram]]:
        """Give the histograms of *metric* (a name of attributes.METRICS) with their labels."""
        if metric == names.METRIC_REQUEST_DURATION:
            for (method, route, status), histogram in self._requests.items():
                yield (method, route, STATUS_CLASSES[status]), histogram
            return
        by_label = {
            names.METRIC_STAGE_DURATION: self._stages,
            names.METRIC_BATCH_SIZE: self._batch_sizes,
            names.METRIC_BATCH_DURATION: self._batch_seconds,
            names.METRIC_COLD_START: self._cold_starts,
            names.METRIC_COLD_START_STAGE: self._cold_stages,
        }
        for label, histogram in by_label[metric].items():
            yield (label,), histogram

    def _add_with_exemplars(self, record: RequestRecord, spent: dict[str, int]) -> None:
        trace, span, duration = record.trace_id, record.span_id, record.duration_ns
        wall = record.process.anchor.wall(record.start_ns + duration)
        request = self._request_histogram(record)
        request.exemplars[request.add(duration)] = Seen(trace, span, duration, wall)
        for stage, charged_ns in spent.items():
            histogram = self._stages[stage]
            seen = Seen(trace, span, charged_ns, wall)
            histogram.exemplars[histogram.add(charged_ns)] = seen

    def _request_histogram(self, record: RequestRecord) -> Histogram:
        key = record.method, record.route, record.status // 100
        found = self._requests.get(key)
        if found is not None:
            return found
        route = _bounded(self._routes, record.route, MAX_ROUTES)
        status = min(key[2], len(STATUS_CLASSES) - 1)
        return self._requests.setdefault((known_method(record.method), route, status), Histogram())

    def _new_stage(self, name: str) -> str:
        stage = stage_of(name)
        if stage not in self._stages:
            if len(self._stages) >= MAX_STAGES:
                return OTHER
            self._stages[stage] = Histogram()
        if len(self._counted_as) < 4 * MAX_STAGES:  # beyond that each is split at its dot anew
            self._counted_as[name] = stage
        return stage


def _bounded(known: set[str], name: str, most: int) -> str:
    if name not in known:
        if len(known) >= most:
            return OTHER
        known.add(name)
    return name
