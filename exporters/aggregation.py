"""Counts the records of one service, with a bound on every name that a client or user can invent."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Final, NamedTuple

from stagescope import semconv as names
from stagescope.exporters.record_waits import waits_of
from stagescope.records import BatchRecord, ColdStartRecord, RequestRecord, State
from stagescope.stages import OTHER, stage_of

DURATION_BOUNDS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1,
    0.125, 0.15, 0.175, 0.2, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip
"""OpenTelemetry's boundaries for `http.server.request.duration`, with more at both ends and around
200 ms, where many objectives lie."""

DURATION_BOUNDS_NS: Final = tuple(round(bound * 1e9) for bound in DURATION_BOUNDS_S)
SIZE_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Seen(NamedTuple):
    """The newest observation of a bucket that has a trace to look at."""

    trace_id: str
    span_id: str
    value: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A histogram at one moment: counts by bucket (the last is above all bounds), not summed up."""

    counts: tuple[int, ...]
    total: int
    exemplars: tuple[Seen | None, ...]


class Histogram:
    """Whole numbers counted by bucket; a bound belongs to the bucket below it."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: Sequence[int] = DURATION_BOUNDS_NS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.exemplars: list[Seen | None] = [None] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> int:
        """Count *value*; returns its bucket."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.total += value
        return bucket

    def snapshot(self) -> Snapshot:
        """Copy what is counted so far."""
        return Snapshot(tuple(self.counts), self.total, tuple(self.exemplars))


MAX_WORKERS: Final = 64
"""Served processes; requests of further ones count under the worker `other`."""
MAX_STAGES: Final = 48
"""Stage names, our own among them; time in further ones counts as `other`."""
MAX_ROUTES: Final = 200
"""Routes; requests to further ones count under the route `other`."""
MAX_STAGE_ROUTES: Final = 50
"""Routes whose stages are counted apart; those of further ones count under the route `other`."""
MAX_SUB_STAGES: Final = 48
"""Names of sub-stages; further ones count in their stage alone."""
MAX_MODELS: Final = 64
"""Models; batches of further ones count under the model `other`."""

STATUS_CLASSES: Final = ("none", "1xx", "2xx", "3xx", "4xx", "5xx")

Labels = tuple[str, ...]


class RouteStats:
    """What the requests of one route charged to stages and sub-stages."""

    __slots__ = ("stages", "sub_stages")

    def __init__(self) -> None:
        self.stages: dict[str, Histogram] = defaultdict(Histogram, {OTHER: Histogram()})
        self.sub_stages: dict[str, Histogram] = defaultdict(Histogram)


class ServiceStats:
    """The histograms of one service."""

    def __init__(self) -> None:
        self._counted_as: dict[str, str] = {OTHER: OTHER}
        """Full stage name to the stage it is counted under."""
        self._stage_names = {OTHER}
        self._sub_stage_names: set[str] = set()
        self._stage_routes: dict[str, RouteStats] = {}
        """By route as counted; `other` for those beyond the bound."""
        self._workers: dict[str, Histogram] = {}
        """By process id, as text."""
        self._routes = {""}
        self._requests: dict[tuple[str, str, int], Histogram] = {}
        self._models: set[str] = set()
        self._batch_sizes: dict[str, Histogram] = defaultdict(partial(Histogram, SIZE_BOUNDS))
        self._batch_seconds: dict[str, Histogram] = defaultdict(Histogram)
        self._stalls: Counter[tuple[str, str]] = Counter()
        self._own: dict[str, Histogram] = defaultdict(Histogram)
        self._waits: dict[tuple[str, str], Histogram] = defaultdict(Histogram)
        """By stage and cause."""
        self.profiled = 0
        """Requests that overlap a capture; they are in no histogram."""
        self._cold_starts: dict[str, Histogram] = defaultdict(Histogram)
        self._cold_stages: dict[str, Histogram] = defaultdict(Histogram)

    def add_request(self, record: RequestRecord, *, has_trace: bool) -> None:
        """Count a request; *has_trace* where an exemplar may point at it."""
        if record.stalls and record.profiled:
            self.profiled += 1
            return
        counted_as, spent = self._counted_as, dict[str, int]()
        within = dict[str, int]()
        rest = record.duration_ns
        for name, _, _, self_ns, _, _ in record.stages:
            stage = counted_as.get(name) or self._new_stage(name)
            spent[stage] = spent.get(stage, 0) + self_ns
            if name in self._sub_stage_names:
                within[name] = within.get(name, 0) + self_ns
            rest -= self_ns
        spent[OTHER] = spent.get(OTHER, 0) + rest
        route = self._stage_routes.get(record.route) or self._new_stage_route(record.route)
        pid = str(record.process.pid)
        worker = self._workers.get(pid) or self._new_worker(pid)
        worker.add(record.duration_ns)
        for name, charged_ns in within.items():
            route.sub_stages[name].add(charged_ns)
        for stall in record.stalls:
            key = counted_as.get(stall.stage) or self._new_stage(stall.stage), stall.cause
            self._stalls[key] += stall.stall_ns
        if record.wait_facts:
            self._add_waits(record, spent)
        if has_trace:
            self._add_with_exemplars(record, route, spent)
            return
        self._request_histogram(record).add(record.duration_ns)
        for stage, charged_ns in spent.items():
            route.stages[stage].add(charged_ns)

    def _add_waits(self, record: RequestRecord, spent: dict[str, int]) -> None:
        waits = waits_of(record)
        if waits is None:
            return
        own, waited = dict(spent), Counter[tuple[str, str]]()
        for wait in waits:
            stage = self._counted_as.get(wait.stage) or self._new_stage(wait.stage)
            own[stage] -= wait.stall_ns
            waited[stage, wait.cause] += wait.stall_ns
        for stage, own_ns in own.items():
            self._own[stage].add(own_ns)
        for key, waited_ns in waited.items():
            self._waits[key].add(waited_ns)

    def add_batch(self, record: BatchRecord) -> None:
        """Count a batch."""
        model = _bounded(self._models, record.model, MAX_MODELS)
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
            self._cold_stages[stage].add(charged_ns)

    def add_until(self, until: str, duration_ns: int) -> None:
        """Count what a cold start took until a point of it."""
        self._cold_starts[until].add(duration_ns)

    def stalls(self) -> dict[tuple[str, str], int]:
        """Return nanoseconds by stage and cause."""
        return dict(self._stalls)

    def series(self, metric: str) -> Iterator[tuple[Labels, Histogram]]:
        """Yield the histograms of *metric* (a name of attributes.METRICS) with their labels."""
        if metric == names.METRIC_REQUEST_DURATION:
            for (method, route, status), histogram in self._requests.items():
                yield (method, route, STATUS_CLASSES[status]), histogram
            return
        if metric in (names.METRIC_STAGE_DURATION, names.METRIC_SUB_STAGE_DURATION):
            for route, stats in self._stage_routes.items():
                own = stats.stages if metric == names.METRIC_STAGE_DURATION else stats.sub_stages
                for stage, histogram in own.items():
                    yield (route, stage), histogram
            return
        if metric == names.METRIC_STAGE_WAIT:
            yield from self._waits.items()
            return
        by_label = {
            names.METRIC_STAGE_OWN: self._own,
            names.METRIC_WORKER_DURATION: self._workers,
            names.METRIC_BATCH_SIZE: self._batch_sizes,
            names.METRIC_BATCH_DURATION: self._batch_seconds,
            names.METRIC_COLD_START: self._cold_starts,
            names.METRIC_COLD_START_STAGE: self._cold_stages,
        }
        for label, histogram in by_label[metric].items():
            yield (label,), histogram

    def _add_with_exemplars(
        self, record: RequestRecord, route: RouteStats, spent: dict[str, int]
    ) -> None:
        trace, span, duration = record.trace_id, record.span_id, record.duration_ns
        wall = record.process.anchor.wall(record.start_ns + duration)
        request = self._request_histogram(record)
        request.exemplars[request.add(duration)] = Seen(trace, span, duration, wall)
        for stage, charged_ns in spent.items():
            histogram = route.stages[stage]
            seen = Seen(trace, span, charged_ns, wall)
            histogram.exemplars[histogram.add(charged_ns)] = seen

    def _request_histogram(self, record: RequestRecord) -> Histogram:
        key = record.method, record.route, record.status // 100
        found = self._requests.get(key)
        if found is not None:
            return found
        route = _bounded(self._routes, record.route, MAX_ROUTES)
        status = min(key[2], len(STATUS_CLASSES) - 1)
        return self._requests.setdefault(
            (names.known_method(record.method), route, status), Histogram()
        )

    def _new_stage_route(self, name: str) -> RouteStats:
        route = name if len(self._stage_routes) < MAX_STAGE_ROUTES else OTHER
        return self._stage_routes.setdefault(route, RouteStats())

    def _new_worker(self, pid: str) -> Histogram:
        worker = pid if len(self._workers) < MAX_WORKERS else OTHER
        return self._workers.setdefault(worker, Histogram())

    def _new_stage(self, name: str) -> str:
        stage = stage_of(name)
        if stage not in self._stage_names:
            if len(self._stage_names) >= MAX_STAGES:
                return OTHER
            self._stage_names.add(stage)
        if stage != name and len(self._sub_stage_names) < MAX_SUB_STAGES:
            self._sub_stage_names.add(name)
        if (
            len(self._counted_as) < 4 * MAX_STAGES
        ):  # beyond that each is split at its dot every time
            self._counted_as[name] = stage
        return stage


def _bounded(known: set[str], name: str, most: int) -> str:
    if name not in known:
        if len(known) >= most:
            return OTHER
        known.add(name)
    return name


# When a process that has started runs steadily: judged from the requests after its cold start.
#
# The rule: of each route, the requests are taken in the order in which they were recorded, WINDOW at
# a time. The process is steady from the end of the first window whose median duration lies within
# TOLERANCE of the median of the window after it; the first route that gets there speaks for the
# process. So it is known one window later, and says nothing of a process with fewer than
# 2 * WINDOW requests of one route.


WINDOW: Final = 20
TOLERANCE: Final = 0.1
MAX_STEADY_ROUTES: Final = 64
MAX_REQUESTS: Final = 100_000
"""Requests after which a process that never became steady is no longer looked at."""


class Steady:
    """Follows one process until it is steady; ask `add` about each of its requests."""

    def __init__(self, cold: ColdStartRecord) -> None:
        self._start_ns = cold.start_ns
        self._windows: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._last: dict[tuple[str, str], tuple[float, int]] = {}
        self._seen = 0

    @property
    def given_up(self) -> bool:
        """True where it is not worth looking further."""
        return self._seen >= MAX_REQUESTS

    def add(self, record: RequestRecord) -> int | None:
        """Return nanoseconds from the process's start until it was steady, once that is known."""
        self._seen += 1
        route = record.method, record.route
        if route not in self._windows and len(self._windows) >= MAX_STEADY_ROUTES:
            return None
        window = self._windows.setdefault(route, [])
        window.append((record.duration_ns, record.start_ns + record.duration_ns))
        if len(window) < WINDOW:
            return None
        now = median([duration for duration, _ in window])
        before = self._last.get(route)
        self._last[route] = now, max(ended for _, ended in window)
        window.clear()
        if before is None or abs(before[0] - now) > TOLERANCE * now:
            return None
        return before[1] - self._start_ns
