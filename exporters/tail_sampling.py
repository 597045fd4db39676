"""Which requests keep their spans. Metrics see every record, whatever is decided here.

The policy, in this order (docs/exporters.md):

1. every request of a load run;
2. every error: a 5xx, an exception, a client that left, a process that died;
3. the slow tail: slower than the running p99 of its route;
4. every sampled request with spans of the app's own under it, which would miss their parent;
5. a share, by trace id, so that all services of one trace decide alike;
6. a further share, likewise, which adapts so that about one a second of each route is kept: a quiet
   server is seen at all.

A caller that sent the sampled flag as 0 takes its request out of 6, and, unless the sampler that
was asked for ignores callers, out of 5. Before all this, what is excluded has no trace.
Spans say by what probability they were kept (`threshold`), so that metrics made of them are right.
A batch is kept where one of its members is, or where it failed itself (otlp/queue.py).
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from stagescope.errors import UsageError
from stagescope.exporters.exclusions import Exclusions
from stagescope.records import RequestRecord, State
from stagescope.semconv import known_method

SLOW_QUANTILE: Final = 0.99
SLOW_AFTER: Final = 200
"""Requests of a route that must have been seen before any of them is called slow."""
FORGET_AFTER: Final = 8192
"""Requests of a route after which the older ones count half."""

_SUB_BUCKETS = 16
_RECOMPUTE_EVERY = 128


class SlowTail:
    """A running p99 of durations, in buckets 6 % wide; the older half weighs half."""

    __slots__ = ("_counts", "_seen", "_until", "limit_ns")

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._seen = 0
        self._until = SLOW_AFTER
        self.limit_ns: float = math.inf
        """What is longer than this is slow; infinite until enough were seen."""

    def add(self, duration_ns: int) -> bool:
        """Count one request; True where it is slow by what was seen before it."""
        bucket = bucket_of(duration_ns)
        self._counts[bucket] = self._counts.get(bucket, 0) + 1
        self._seen += 1
        slow = duration_ns > self.limit_ns
        if self._seen >= self._until:
            self._recompute()
        return slow

    def _recompute(self) -> None:
        above = self._seen * (1 - SLOW_QUANTILE)
        for bucket in sorted(self._counts, reverse=True):
            above -= self._counts[bucket]
            if above < 0:
                self.limit_ns = upper_edge(bucket)
                break
        if self._seen >= FORGET_AFTER:
            halved = ((bucket, count // 2) for bucket, count in self._counts.items())
            self._counts = {bucket: count for bucket, count in halved if count}
            self._seen = sum(self._counts.values())
        self._until = self._seen + _RECOMPUTE_EVERY


def bucket_of(duration_ns: int) -> int:
    """Return the bucket of a duration: 16 of equal width between two powers of two."""
    exponent = duration_ns.bit_length() - 5
    return exponent * _SUB_BUCKETS + (duration_ns >> exponent) if exponent > 0 else duration_ns


def upper_edge(bucket: int) -> int:
    """Return the longest duration that falls into *bucket*."""
    if bucket < 2 * _SUB_BUCKETS:
        return bucket
    exponent, mantissa = divmod(bucket - _SUB_BUCKETS, _SUB_BUCKETS)
    return ((mantissa + _SUB_BUCKETS + 1) << exponent) - 1


DEFAULT_SHARE: Final = 0.05
SECOND_NS: Final = 1_000_000_000
MAX_ROUTES: Final = 1024


class Reason(StrEnum):
    """Why a request keeps its spans."""

    LOAD_RUN = "load_run"
    ERROR = "error"
    SLOW = "slow"
    NESTED = "nested"
    FLOOR = "floor"
    SHARE = "share"


@dataclass(frozen=True, slots=True)
class Share:
    """How much of the rest is kept: of roots, and of requests whose caller said yes or no."""

    root: float = DEFAULT_SHARE
    parent_sampled: float = DEFAULT_SHARE
    parent_not_sampled: float = 0.0


def share_from_environment(environ: Mapping[str, str] = os.environ) -> Share:
    """Return the share that `OTEL_TRACES_SAMPLER` and `OTEL_TRACES_SAMPLER_ARG` ask for.

    Raises UsageError for a sampler that OpenTelemetry's specification does not name, or for a
    ratio that is no number from 0 to 1.
    """
    sampler = environ.get("OTEL_TRACES_SAMPLER", "").strip().lower()
    if not sampler:
        return Share()
    parent_based = sampler.startswith("parentbased_")
    match sampler.removeprefix("parentbased_"):
        case "always_on":
            ratio = 1.0
        case "always_off":
            ratio = 0.0
        case "traceidratio":
            ratio = _ratio(environ.get("OTEL_TRACES_SAMPLER_ARG", ""))
        case _:
            raise UsageError(
                f"OTEL_TRACES_SAMPLER={sampler!r} is not known; give always_on, always_off or "
                "traceidratio, each also with parentbased_ before it"
            )
    return Share(ratio, 1.0, 0.0) if parent_based else Share(ratio, ratio, ratio)


RANDOM_DIGITS: Final = 14
"""Of the end of a trace id: what OpenTelemetry's probability sampling takes for random, 56 bits."""
ALL: Final = 1 << 4 * RANDOM_DIGITS


def threshold_of(probability: float) -> int:
    """Return what the random part of a trace id must reach to be kept with *probability*."""
    return ALL - round(min(probability, 1.0) * ALL)


def _ratio(text: str) -> float:
    try:
        ratio = float(text or "1")
    except ValueError:
        ratio = math.nan
    if not 0 <= ratio <= 1:
        raise UsageError(f"OTEL_TRACES_SAMPLER_ARG={text!r} is not a number from 0 to 1")
    return ratio


class RouteMemory:
    """What the policy remembers of one route."""

    __slots__ = ("_before", "_now", "_second", "tail")

    def __init__(self) -> None:
        self.tail = SlowTail()
        self._second = -1
        self._before = self._now = 0
        """Requests that ended in the second before this one, and in this one so far."""

    def one_a_second(self, record: RequestRecord) -> int:
        """Count *record*; return the threshold by which about one a second of this route is kept.

        It depends on how many requests came before, and on nothing of this one.
        """
        second = (record.start_ns + record.duration_ns) // SECOND_NS
        if second > self._second:
            self._before = self._now if second == self._second + 1 else 0
            self._second, self._now = second, 0
        self._now += 1
        return threshold_of(1 / max(self._before, self._now))


@dataclass(frozen=True, slots=True)
class Kept:
    """Why a request keeps its spans, and by what probability it was kept."""

    reason: Reason
    threshold: int | None
    """As in `threshold_of`; 0: it is always kept; None where the probability is not known."""


class TailSampler:
    """Decides, one record after the other, which requests keep their spans."""

    def __init__(self, share: Share | None = None, *, excluded: Exclusions | None = None) -> None:
        self.share = share or share_from_environment()
        self._excluded = excluded or Exclusions()
        self._root = threshold_of(self.share.root)
        self._parent_sampled = threshold_of(self.share.parent_sampled)
        self._parent_not_sampled = threshold_of(self.share.parent_not_sampled)
        self.routes: dict[tuple[str, str, str], RouteMemory] = {}
        self._overflow = RouteMemory()

    def kept(self, record: RequestRecord) -> Kept | None:
        """Return why *record* keeps its spans; None where it does not. Counts it, so ask once."""
        if self._excluded.no_trace(record):
            return None
        route = self._route(record)
        # A profiled one is slow for the capture's sake: it neither is of the tail nor moves it.
        slow = not record.profiled and route.tail.add(record.duration_ns)
        floor = route.one_a_second(record) if record.sampled else ALL
        if reason := _standing(record, slow):
            return Kept(reason, None if reason is Reason.NESTED else 0)
        share, random = self._share(record), _random(record)
        if random < min(share, floor):
            return None
        return Kept(Reason.SHARE if random >= share else Reason.FLOOR, min(share, floor))

    def reason(self, record: RequestRecord) -> Reason | None:
        """Return the reason of `kept`. Counts the record, so ask for one of the two, once."""
        kept = self.kept(record)
        return kept.reason if kept else None

    def certain(self, record: RequestRecord) -> bool:
        """Return, without counting it, whether *record* is kept for more than the floor.

        Metrics ask this before they point an exemplar at a trace.
        """
        if self._excluded.no_trace(record):
            return False
        slow = not record.profiled and record.duration_ns > self._route(record).tail.limit_ns
        return _standing(record, slow) is not None or _random(record) >= self._share(record)

    def _share(self, record: RequestRecord) -> int:
        if not record.sampled:
            return self._parent_not_sampled
        return self._parent_sampled if record.parent_span_id else self._root

    def _route(self, record: RequestRecord) -> RouteMemory:
        key = record.process.service, known_method(record.method), record.route
        route = self.routes.get(key)
        if route is None:
            if len(self.routes) >= MAX_ROUTES:
                return self._overflow
            route = self.routes[key] = RouteMemory()
        return route


def _standing(record: RequestRecord, slow: bool) -> Reason | None:
    """Return why *record* is kept whatever its trace id."""
    if record.run_id:
        return Reason.LOAD_RUN
    if record.error or record.status >= 500 or record.state is State.DIED:
        return Reason.ERROR
    if slow:
        return Reason.SLOW
    return Reason.NESTED if record.nested and record.sampled else None


def _random(record: RequestRecord) -> int:
    return int(record.trace_id[-RANDOM_DIGITS:], 16)
