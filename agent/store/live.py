"""The last minute of requests, summed by service and route: an answer without a load run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stagescope.agent.sinks import PromptSink
from stagescope.exporters.tail_sampling import bucket_of, upper_edge
from stagescope.records import Record, RequestRecord, State
from stagescope.stages import OTHER, stage_of

WINDOW_S = 60
MAX_ROUTES = 50
"""Routes counted apart in one second; those of further requests count as `other`."""
MAX_STAGES = 48
"""Stages counted apart for one route and second; time in further ones counts as `other`."""
LEAST_FOR_P99 = 100
"""Requests below which there is no p99: fewer than one request would lie above it."""
LEAST_FOR_P95 = 20


@dataclass(frozen=True, slots=True)
class RouteSummary:
    """One route's requests; times in milliseconds, percentiles at most 6 % above the truth."""

    service: str
    route: str
    requests: int
    errors: int
    """Answered by a 5xx, or cut off by the process's death."""
    mean_ms: float
    p50_ms: float
    p95_ms: float | None
    """None where there are fewer than LEAST_FOR_P95 requests."""
    p99_ms: float | None
    """None where there are fewer than LEAST_FOR_P99 requests."""
    stages_ms: dict[str, float]
    """Mean time a request charged to each stage that any of them recorded, and to `other`."""


class _Sums:
    __slots__ = ("durations", "errors", "requests", "stages", "total_ns")

    def __init__(self) -> None:
        self.requests = self.errors = self.total_ns = 0
        self.durations: dict[int, int] = {}
        """Requests by `bucket_of` their duration."""
        self.stages: dict[str, int] = {}

    def add(self, record: RequestRecord) -> None:
        self.requests += 1
        self.errors += record.status >= 500 or record.state is State.DIED
        self.total_ns += record.duration_ns
        bucket = bucket_of(record.duration_ns)
        self.durations[bucket] = self.durations.get(bucket, 0) + 1
        rest, stages = record.duration_ns, self.stages
        for span in record.stages:
            stage = stage_of(span.stage)
            if stage not in stages and len(stages) >= MAX_STAGES:
                continue  # It stays in the rest.
            stages[stage] = stages.get(stage, 0) + span.self_ns
            rest -= span.self_ns
        stages[OTHER] = stages.get(OTHER, 0) + rest

    def merge(self, sums: _Sums) -> None:
        self.requests += sums.requests
        self.errors += sums.errors
        self.total_ns += sums.total_ns
        for bucket, count in sums.durations.items():
            self.durations[bucket] = self.durations.get(bucket, 0) + count
        for stage, spent_ns in sums.stages.items():
            self.stages[stage] = self.stages.get(stage, 0) + spent_ns

    def quantile_ms(self, share: float) -> float:
        below, wanted, bucket = 0, share * self.requests, 0
        for bucket in sorted(self.durations):
            below += self.durations[bucket]
            if below >= wanted:
                break
        return upper_edge(bucket) / 1e6


class LiveWindow(PromptSink):
    """A sink that keeps sums of the last minute, a second each; safe from several threads."""

    def __init__(self, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._clock = clock
        self._seconds: dict[int, dict[tuple[str, str], _Sums]] = {}
        self._lock = threading.Lock()

    def accept(self, records: Sequence[Record]) -> None:
        """Add the requests among *records*; a profiled one's times are not the server's own."""
        oldest = self._clock() // 1_000_000_000 - WINDOW_S
        with self._lock:
            for second in [known for known in self._seconds if known < oldest]:
                del self._seconds[second]
            for record in records:
                if isinstance(record, RequestRecord) and not record.profiled:
                    second = (record.start_ns + record.duration_ns) // 1_000_000_000
                    if second >= oldest:
                        self._add(self._seconds.setdefault(second, {}), record)
        self.accepted += len(records)

    def _add(self, routes: dict[tuple[str, str], _Sums], record: RequestRecord) -> None:
        key = record.process.service, record.route
        if key not in routes and len(routes) >= MAX_ROUTES:
            key = key[0], OTHER
        routes.setdefault(key, _Sums()).add(record)

    def read(self, window_s: int = WINDOW_S) -> list[RouteSummary]:
        """Return each route's requests of the last *window_s* seconds, busiest route first."""
        since = self._clock() // 1_000_000_000 - window_s
        merged: dict[tuple[str, str], _Sums] = {}
        with self._lock:
            for second, routes in self._seconds.items():
                if second >= since:
                    for key, sums in routes.items():
                        merged.setdefault(key, _Sums()).merge(sums)
        busiest = sorted(merged.items(), key=lambda one: (one[0][0], -one[1].total_ns, one[0][1]))
        return [_summary(*key, sums) for key, sums in busiest]


def _summary(service: str, route: str, sums: _Sums) -> RouteSummary:
    count = sums.requests
    return RouteSummary(
        service=service,
        route=route,
        requests=count,
        errors=sums.errors,
        mean_ms=sums.total_ns / count / 1e6,
        p50_ms=sums.quantile_ms(0.5),
        p95_ms=sums.quantile_ms(0.95) if count >= LEAST_FOR_P95 else None,
        p99_ms=sums.quantile_ms(0.99) if count >= LEAST_FOR_P99 else None,
        stages_ms={stage: spent / count / 1e6 for stage, spent in sums.stages.items()},
    )


def to_json(summaries: Sequence[RouteSummary], window_s: int) -> dict[str, Any]:
    """Return what `GET /live` answers."""
    return {"window_s": window_s, "routes": [asdict(summary) for summary in summaries]}
