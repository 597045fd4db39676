"""What the slowest requests ran that the median ones did not, from stacks laid over requests.

A stack sample belongs to the requests that were, at its time, in its stage in its process; where
those are several, each has an equal part of it. Requests are *slow* from the 99th percentile of
their durations on, *median* from the 25th to the 75th. Pure functions.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from stagescope.stacks import Frame, StackSpan

SLOW_FROM = 0.99
MEDIAN = (0.25, 0.75)
NEAR_NS = 10_000_000
SAME = 1e-6


@dataclass(frozen=True, slots=True)
class StageInterval:
    """One opening of a stage, on the host's monotonic clock."""

    stage: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as far as stacks ask."""

    pid: int
    duration_ns: int
    stages: tuple[StageInterval, ...]


@dataclass(frozen=True, slots=True)
class FrameShare:
    """How much of the samples of either class a function is in, 0 to 1."""

    stage: str
    function: str
    file: str
    slow: float
    median: float

    @property
    def difference(self) -> float:
        """Positive: the slow requests have more of it."""
        return self.slow - self.median


@dataclass(frozen=True, slots=True)
class SlowDiff:
    """Both classes of requests, and the stacks that each of them has."""

    slow_from_ns: int
    slow_requests: int
    median_requests: int
    slow: tuple[tuple[StackSpan, float], ...]
    """Stacks with the part of their time (s) that slow requests have."""
    median: tuple[tuple[StackSpan, float], ...]
    unmatched: int
    """Stacks with a stage, but no request in it at that time: other traffic, a batcher's thread."""

    def shares(self) -> list[FrameShare]:
        """Give each stage and its functions, the greatest difference first, of either sign.

        A stage's own row has no function; a function that all stacks of its stage go through
        would only say the same again, and is left out.
        """
        slow, median = _shares(self.slow), _shares(self.median)
        found = [
            FrameShare(*key, slow.get(key, 0.0), median.get(key, 0.0))
            for key in slow.keys() | median.keys()
        ]
        whole = {one.stage: one for one in found if not one.function}
        telling = [one for one in found if not one.function or not _same(one, whole[one.stage])]
        return sorted(telling, key=lambda f: (-abs(f.difference), f.stage, f.function, f.file))


def _same(one: FrameShare, other: FrameShare) -> bool:
    return abs(one.slow - other.slow) < SAME and abs(one.median - other.median) < SAME


def slow_diff(spans: Sequence[StackSpan], requests: Sequence[Request]) -> SlowDiff:
    """Lay *spans* over *requests* and part them into slow and median."""
    durations = sorted(request.duration_ns for request in requests)
    slow_from = percentile(durations, SLOW_FROM)
    low, high = (percentile(durations, share) for share in MEDIAN)
    slow: list[tuple[StackSpan, float]] = []
    median: list[tuple[StackSpan, float]] = []
    unmatched = 0
    for span, candidates in overlaid([s for s in spans if s.stage], requests):
        unmatched += not candidates
        seconds = (span.end_ns - span.start_ns) / 1e9 / max(1, len(candidates))
        of_slow = sum(one.duration_ns >= slow_from for one in candidates)
        of_median = sum(low <= one.duration_ns <= high for one in candidates)
        slow += [(span, seconds * of_slow)] if of_slow else []
        median += [(span, seconds * of_median)] if of_median else []
    return SlowDiff(
        slow_from,
        sum(duration >= slow_from for duration in durations),
        sum(low <= duration <= high for duration in durations),
        tuple(slow),
        tuple(median),
        unmatched,
    )


def percentile(ordered: Sequence[int], share: float) -> int:
    """Give the smallest of *ordered* values with *share* of them before it; 0 where there are none.

    So that from the 99th percentile on there is the slowest 1 %, and at least one.
    """
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def overlaid(
    spans: Sequence[StackSpan], requests: Sequence[Request]
) -> Iterator[tuple[StackSpan, list[Request]]]:
    """Give with each span the requests that were in its stage, in its process, when it was seen.

    Where there is none, those nearest within NEAR_NS: a sampler's times may be off by so much.
    """
    openings: dict[tuple[int, str], list[_Opening]] = {}
    for number, request in enumerate(requests):
        for one in request.stages:
            opening = _Opening(one.start_ns, one.end_ns, number)
            openings.setdefault((request.pid, one.stage), []).append(opening)
    by_place: dict[tuple[int, str], list[StackSpan]] = {}
    for span in spans:
        by_place.setdefault((span.pid, span.stage), []).append(span)
    for place, there in by_place.items():
        for span, numbers in _swept(there, sorted(openings.get(place, ()))):
            yield span, [requests[number] for number in sorted(numbers)]


class _Opening(NamedTuple):
    start_ns: int
    end_ns: int
    request: int

    def off_ns(self, at_ns: int) -> int:
        """Give how far *at_ns* is outside; 0 inside."""
        return max(self.start_ns - at_ns, at_ns - self.end_ns, 0)


def _swept(
    spans: Sequence[StackSpan], openings: Sequence[_Opening]
) -> Iterator[tuple[StackSpan, set[int]]]:
    """Go through both in the order of time, with those openings at hand that are near."""
    near: list[tuple[int, _Opening]] = []
    following = 0
    for span in sorted(spans, key=lambda span: span.seen_ns):
        at_ns = span.seen_ns
        while following < len(openings) and openings[following].start_ns <= at_ns + NEAR_NS:
            heapq.heappush(near, (openings[following].end_ns, openings[following]))
            following += 1
        while near and near[0][0] < at_ns - NEAR_NS:
            heapq.heappop(near)
        nearest_ns = min((opening.off_ns(at_ns) for _, opening in near), default=0)
        yield span, {one.request for _, one in near if one.off_ns(at_ns) == nearest_ns}


def _shares(weighed: Sequence[tuple[StackSpan, float]]) -> dict[tuple[str, str, str], float]:
    whole = sum(weight for _, weight in weighed) or 1.0
    shares: dict[tuple[str, str, str], float] = {}
    for span, weight in weighed:
        for function, file in {
            ("", ""),
            *_functions(span.frames),
        }:  # once a stack, however deep it recurses
            key = (span.stage, function, file)
            shares[key] = shares.get(key, 0.0) + weight / whole
    return shares


def _functions(frames: Sequence[Frame]) -> set[tuple[str, str]]:
    return {(frame.function, frame.file) for frame in frames}
