"""How fast something grew over a run, and whether that is a leak: memory, descriptors, threads.

The rule looks at the medians of the run's eighths: a leak rises from each to the next, all the
time, by steps that are alike. Its slope is the median of the slopes between all pairs of these
medians (Theil 1950, Sen 1968), so a few wild readings do not move it.
Of random walks it takes 6 in 100 for a leak, of scatter that hangs together over 20 readings 2.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from statistics import median

from stagescope.analysis.resources.attribution import RSS
from stagescope.analysis.resources.model import Memory
from stagescope.analysis.resources.window import Window, amounts, samples_in
from stagescope.analysis.sources import RunTables, rows

LEAST_POINTS = 10
LEAST_SPAN_S = 60.0
"""A server that has just started grows for as long; what is shorter tells nothing of leaks."""
PARTS = 8
LEAST_RISES = 6
"""Of 7 steps from one eighth's median to the next, so many go up."""
STILL_GROWING = 0.5
"""A leak goes on: its second half has at least this share of the whole's slope."""


@dataclass(frozen=True, slots=True)
class Slope:
    """How fast a series grew, in its own unit a second."""

    per_s: float
    second_half_per_s: float
    """The slope of the later half by itself."""
    rises: int
    """How many eighths of it have a higher median than the eighth before."""
    alike: bool
    """At least half of the steps differ from the median step by no more than that step."""
    span_s: float
    points: int

    @property
    def doubt(self) -> str:
        """Why no leak is reported; empty where one is."""
        if self.points < LEAST_POINTS:
            return f"{self.points} readings are too few to tell"
        if self.span_s < LEAST_SPAN_S:
            return f"{self.span_s:.0f} s are too short to tell: it takes {LEAST_SPAN_S:.0f} s"
        if self.rises < LEAST_RISES or self.per_s <= 0:
            return "it grew now and then, not all the time"
        if self.second_half_per_s < STILL_GROWING * self.per_s:
            return "it grew at first, and less later on: warming up, not a leak"
        return "" if self.alike else "no growth that stands out from its scatter"

    @property
    def leak(self) -> bool:
        """True where it grew, and went on growing, beyond what its scatter explains."""
        return not self.doubt


def slope(readings: Sequence[tuple[int, float]]) -> Slope:
    """Return the slope of *readings*: time in ns, in any order, and value, any number of them."""
    ordered = sorted(readings)
    if not ordered:
        return Slope(0.0, 0.0, 0, False, 0.0, 0)
    start_ns, end_ns = ordered[0][0], ordered[-1][0]
    bounds = [len(ordered) * part // PARTS for part in range(PARTS + 1)]
    middles = [
        (median((ns - start_ns) / 1e9 for ns, _ in part), median(value for _, value in part))
        for a, b in pairwise(bounds)
        if (part := ordered[a:b])
    ]
    steps = [later - earlier for (_, earlier), (_, later) in pairwise(middles)]
    step = median(steps) if steps else 0.0
    return Slope(
        per_s=_median_slope(middles),
        second_half_per_s=_median_slope(middles[len(middles) // 2 :]),
        rises=sum(one > 0 for one in steps),
        alike=2 * sum(abs(one - step) <= step for one in steps) >= len(steps),
        span_s=(end_ns - start_ns) / 1e9,
        points=len(ordered),
    )


def _median_slope(points: Sequence[tuple[float, float]]) -> float:
    slopes = [(b - a) / (t1 - t0) for (t0, a), (t1, b) in combinations(points, 2) if t1 > t0]
    return median(slopes) if slopes else 0.0


ALLOCATOR = "model_server.torch.memory.events"
RETRIES = "num_alloc_retries"


def memory_over_run(tables: RunTables, window: Window, pids: Collection[int]) -> Memory | None:
    """Return first, last and growth of *pids* together; None where their memory was not sampled."""
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
    """Return what the processes that surely grew, grew by a second; None where none did."""
    slopes = [slope(readings) for readings in series]
    growing = [each.per_s for each in slopes if each.leak]
    return sum(growing) if growing else None
