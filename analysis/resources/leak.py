"""How fast something grew over a run, and whether that is a leak: memory, descriptors, threads.

The slope is the median of the slopes between all pairs of readings (Theil 1950, Sen 1968): a few
wild readings do not move it. Its interval is Sen's, from the variance of Kendall's S, widened for
readings that hang together over time (Hamed and Rao 1998, J. Hydrol. 204): memory's do, and taken
as independent they would prove anything.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from statistics import NormalDist, median

from stagescope.analysis.resources.attribution import RSS
from stagescope.analysis.resources.model import Memory
from stagescope.analysis.resources.window import Window, amounts, samples_in
from stagescope.analysis.sources import RunTables, rows

LEVEL = 0.95
"""Of the interval."""
MOST_POINTS = 200
"""Longer series are folded to so many medians: pairs grow with the square."""
LEAST_POINTS = 10
LEAST_SPAN_S = 60.0
"""A server that has just started grows for as long; what is shorter tells nothing of leaks."""
PARTS = 8
LEAST_RISES = 6
"""A leak is there all the time: of 7 steps from one eighth's median to the next, so many go up.

Without it one random walk in five passes for a leak.
"""
STILL_GROWING = 0.5
"""A leak goes on: its second half has at least this share of the whole's slope."""


@dataclass(frozen=True, slots=True)
class Slope:
    """How fast a series grew, in its own unit a second."""

    per_s: float
    low_per_s: float
    high_per_s: float
    """The bounds of the interval, of LEVEL; infinite where there are too few readings for one."""
    second_half_per_s: float
    """The slope of the later half by itself."""
    rises: int
    """How many eighths of it have a higher median than the eighth before."""
    span_s: float
    points: int
    """Readings, before folding."""

    @property
    def doubt(self) -> str:
        """Why no leak is told; empty where one is."""
        if self.points < LEAST_POINTS:
            return f"{self.points} readings are too few to tell"
        if self.span_s < LEAST_SPAN_S:
            return f"{self.span_s:.0f} s are too short to tell: it takes {LEAST_SPAN_S:.0f} s"
        if self.low_per_s <= 0:
            return "no growth that stands out from its scatter"
        if self.rises < LEAST_RISES:
            return "it grew now and then, not all the time"
        if self.second_half_per_s < STILL_GROWING * self.per_s:
            return "it grew at first, and less later on: warming up, not a leak"
        return ""

    @property
    def leak(self) -> bool:
        """True where it grew, and went on growing, beyond what its scatter explains."""
        return not self.doubt


def slope(readings: Sequence[tuple[int, float]]) -> Slope:
    """Give the slope of *readings*: time in ns, in any order, and value, any number of them."""
    ordered = sorted(readings)
    if not ordered:
        return Slope(0.0, -math.inf, math.inf, 0.0, 0, 0.0, 0)
    start_ns, end_ns = ordered[0][0], ordered[-1][0]
    points = _folded([((ns - start_ns) / 1e9, value) for ns, value in ordered])
    slopes = _slopes(points)
    middle = median(slopes) if slopes else 0.0
    low, high = _bounds(slopes, points, middle)
    late = _slopes(points[len(points) // 2 :])
    return Slope(
        per_s=middle,
        low_per_s=low,
        high_per_s=high,
        second_half_per_s=median(late) if late else 0.0,
        rises=_rises([value for _, value in points]),
        span_s=(end_ns - start_ns) / 1e9,
        points=len(ordered),
    )


def _folded(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Give neighbours as the medians of their times and values, where there are too many."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return points
    parts = [points[i : i + size] for i in range(0, len(points), size)]
    return [(median(t for t, _ in part), median(v for _, v in part)) for part in parts]


def _slopes(points: Sequence[tuple[float, float]]) -> list[float]:
    """Give the slopes between all pairs of *points* at different times, in order."""
    return sorted(
        (later - earlier) / (t1 - t0)
        for i, (t0, earlier) in enumerate(points)
        for t1, later in points[i + 1 :]
        if t1 > t0
    )


def _rises(values: Sequence[float]) -> int:
    """Count how many of PARTS parts have a higher median than the one before."""
    bounds = [len(values) * part // PARTS for part in range(PARTS + 1)]
    parts = [values[a:b] for a, b in pairwise(bounds) if b > a]
    return sum(later > earlier for earlier, later in pairwise(median(part) for part in parts))


def _bounds(
    slopes: Sequence[float], points: Sequence[tuple[float, float]], middle: float
) -> tuple[float, float]:
    """Give the slopes so many ranks below and above the median as chance alone would reach."""
    if len(points) < LEAST_POINTS or not slopes:
        return -math.inf, math.inf
    deviation = math.sqrt(_variance([v for _, v in points]) * _dependence(points, middle))
    away = NormalDist().inv_cdf((1 + LEVEL) / 2) * deviation
    low, high = math.floor((len(slopes) - away) / 2), math.ceil((len(slopes) + away) / 2)
    return (
        slopes[low] if low >= 0 else -math.inf,
        slopes[high] if high < len(slopes) else math.inf,
    )


def _variance(values: Sequence[float]) -> float:
    """Give that of Kendall's S for values in random order; equal ones count for less."""
    n = len(values)
    ties = [len(list(same)) for _, same in groupby(sorted(values))]
    return (n * (n - 1) * (2 * n + 5) - sum(t * (t - 1) * (2 * t + 5) for t in ties)) / 18


def _dependence(points: Sequence[tuple[float, float]], middle: float) -> float:
    """Give by how much the variance grows, at least 1, because neighbours are alike.

    From the autocorrelation of the ranks of what the slope leaves over, where it is significant.
    """
    n = len(points)
    ranks = _ranks([value - middle * t for t, value in points])
    mean = sum(ranks) / n
    left = [rank - mean for rank in ranks]
    square = sum(one * one for one in left)
    if not square:
        return 1.0
    limit = NormalDist().inv_cdf((1 + LEVEL) / 2) / math.sqrt(n)
    total = 0.0
    for lag in range(1, n - 2):
        alike = sum(a * b for a, b in zip(left, left[lag:], strict=False)) / square
        if alike < limit:
            break  # beyond the first lag that is not alike, all is noise
        total += (n - lag) * (n - lag - 1) * (n - lag - 2) * alike
    return 1 + 2 * total / (n * (n - 1) * (n - 2))


def _ranks(values: Sequence[float]) -> list[float]:
    """Give the place of each value in their order; equal ones share the mean of theirs."""
    order = sorted(range(len(values)), key=values.__getitem__)
    ranks = [0.0] * len(values)
    place = 0
    for _, same in groupby(order, key=values.__getitem__):
        indexes = list(same)
        for index in indexes:
            ranks[index] = place + (len(indexes) - 1) / 2
        place += len(indexes)
    return ranks


ALLOCATOR = "model_server.torch.memory.events"
RETRIES = "num_alloc_retries"


def memory_over_run(tables: RunTables, window: Window, pids: Collection[int]) -> Memory | None:
    """Give first, last and growth of *pids* together; None where their memory was not sampled."""
    found = samples_in(tables.samples, window, RSS)
    own = found.filter(found.pid.isin(sorted(pids))).order_by("pid", "begin_ns")
    series: dict[int, list[tuple[int, float]]] = {}
    for row in rows(own.select("pid", "begin_ns", "value")):
        series.setdefault(row["pid"], []).append((row["begin_ns"], row["value"]))
    if not series:
        return None
    events = amounts(tables.samples, window, ALLOCATOR, "detail")
    return Memory(
        rss_first_bytes=sum(readings[0][1] for readings in series.values()),
        rss_last_bytes=sum(readings[-1][1] for readings in series.values()),
        slope_bytes_per_s=_growth(list(series.values())),
        alloc_retries=events.get((RETRIES,)),
    )


def _growth(series: Collection[list[tuple[int, float]]]) -> float | None:
    """Give what the processes that surely grew, grew by a second; None where none did."""
    slopes = [slope(readings) for readings in series]
    growing = [each.per_s for each in slopes if each.leak]
    return sum(growing) if growing else None
