"""What threads and event loops did for each stage, and how a stage's time grows with its crowd."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stagescope.analysis.waits.requests import Interval, Served, Waits, cut, most_at_once, segments
from stagescope.stages import stage_of

Floats = npt.NDArray[np.float64]

MOST_REQUESTS = 50_000
"""Of more, as many are looked at, evenly spread: amounts are scaled up, crowds are not known."""
LEAST_ALONE = 5
LEAST_FOR_SLOPE = 30
FEW = 0.1
"""Of the visits: those that met fewest others."""


@dataclass(slots=True)
class StageWork:
    """One outer stage, all requests together; ns."""

    loop_ns: float = 0.0
    thread_ns: float = 0.0
    off_ns: float = 0.0
    """Of both: off its core, for whatever cause."""
    visits: list[tuple[int, int, float]] = field(default_factory=list[tuple[int, int, float]])
    """First opening, last end, and own time, a request."""


@dataclass(frozen=True, slots=True)
class Crowd:
    """How a stage's own time goes with the others in it."""

    alone_ms: float | None
    few_ms: float
    per_other_ms: float | None
    others: float
    open_max: int


@dataclass(frozen=True, slots=True)
class Work:
    """What was at work in a run."""

    requests: int
    stages: Mapping[str, StageWork]
    loop_busy: float | None
    loop_starved: float
    """Of the time in which loops ran, or wanted to: they had no core."""
    threads_busy: float
    threads_max: int
    threads_computing: float
    gc_share: float


def work(served: Sequence[Served], found: Mapping[str, Waits]) -> Work | None:
    """Return what was at work for *served*; None where none of them has a fact."""
    if not any(request.facts for request in served):
        return None
    step = -(-len(served) // MOST_REQUESTS)
    looked_at = served[::step]
    stages: dict[str, StageWork] = defaultdict(StageWork)
    loops: dict[tuple[str, int], list[Interval]] = defaultdict(list)
    threads: set[Interval] = set()
    """A batch's thread is at work for several requests at once."""
    pauses: dict[str, list[Interval]] = defaultdict(list)
    computed = ran = starved = 0.0
    for request in looked_at:
        waits = found.get(request.key, Waits())
        parts = segments(request)
        _visits(request, parts, waits, stages)
        off = _amounts(request, "off", "queued")
        queued = _amounts(request, "queued")
        threads_of = {fact.start_ns for fact in request.facts if fact.kind == "thread"}
        on_loop = {start: ns for start, ns in queued.items() if start not in threads_of}
        steps = {f.start_ns: f.end_ns - f.start_ns for f in request.facts if f.kind == "ran"}
        starved += sum(on_loop.values())
        ran += sum(steps.values()) + sum(ns for at, ns in on_loop.items() if at not in steps)
        for fact in request.facts:
            bounds = request.start_ns + fact.start_ns, request.start_ns + fact.end_ns
            length = bounds[1] - bounds[0]
            if length <= 0:
                continue
            if fact.kind in ("ran", "thread"):
                idle = min(off.get(fact.start_ns, 0), length)
                for first, last, stage in cut(parts, *bounds):
                    of = stages[stage_of(stage)]
                    share = (last - first) / length
                    of.off_ns += idle * share
                    if fact.kind == "ran":
                        of.loop_ns += last - first
                    else:
                        of.thread_ns += last - first
            if fact.kind in ("ran", "busy"):
                loops[request.process, fact.loop].append(bounds)
            elif fact.kind == "thread" and bounds not in threads:
                threads.add(bounds)
                computed += length - min(off.get(fact.start_ns, 0), length)
            elif fact.kind == "gc":
                pauses[request.process].append(bounds)
    begin = min(request.start_ns for request in looked_at)
    window = max(1, max(one.start_ns + one.duration_ns for one in looked_at) - begin)
    for of in stages.values():
        of.loop_ns, of.thread_ns, of.off_ns = (
            step * value for value in (of.loop_ns, of.thread_ns, of.off_ns)
        )
    return Work(
        requests=len(served),
        stages=stages,
        loop_busy=min(1.0, step * max(map(union, loops.values())) / window) if loops else None,
        loop_starved=min(1.0, starved / ran) if ran else 0.0,
        threads_busy=step * sum(end - start for start, end in threads) / window,
        threads_max=most_at_once(threads),
        threads_computing=step * computed / window,
        gc_share=max(map(union, pauses.values()), default=0) / window,
    )


def _amounts(request: Served, *kinds: str) -> dict[int, int]:
    """Return by the start of a stretch for how long its thread was on no core, for these causes."""
    sums: dict[int, int] = defaultdict(int)
    for fact in request.facts:
        if fact.kind in kinds:
            sums[fact.start_ns] += fact.end_ns - fact.start_ns
    return sums


def _visits(
    request: Served,
    parts: Iterable[tuple[int, int, str]],
    waits: Waits,
    stages: Mapping[str, StageWork],
) -> None:
    charged: dict[str, list[int]] = defaultdict(list)
    spent: dict[str, float] = defaultdict(float)
    for first, last, stage in parts:
        outer = stage_of(stage)
        charged[outer] += (first, last)
        spent[outer] += last - first
    for (stage, _), charge in waits.charges.items():
        spent[stage_of(stage)] -= charge.ns
    for outer, times in charged.items():
        stages[outer].visits.append((min(times), max(times), max(0.0, spent[outer])))


def crowd(visits: Sequence[tuple[int, int, float]]) -> Crowd | None:
    """Return how own time goes with the number of others there; None of fewer than two visits."""
    if len(visits) < 2:
        return None
    table: Floats = np.array(visits, dtype=np.float64)
    table = table[np.argsort(table[:, 0], kind="stable")]
    starts, own_ms = table[:, 0], table[:, 2] / 1e6
    ended = np.searchsorted(np.sort(table[:, 1]), starts, side="right")
    there = np.arange(len(starts)) - ended
    alone = own_ms[there <= 0]
    few = own_ms[there <= np.quantile(there, FEW)]
    spread = float(there.var())
    slope = None
    if len(starts) >= LEAST_FOR_SLOPE and spread > 0:
        slope = float(((there - there.mean()) * (own_ms - own_ms.mean())).mean() / spread)
    return Crowd(
        alone_ms=float(np.median(alone)) if len(alone) >= LEAST_ALONE else None,
        few_ms=float(np.median(few)),
        per_other_ms=slope,
        others=float(there.mean()),
        open_max=int(there.max()) + 1,
    )


def forming_ms(served: Sequence[Served], busy: Sequence[Interval]) -> list[float]:
    """Return of each request for how long it waited for its batch while no batch was at work.

    *busy* is when batches were, absolute. That is the batcher's own delay; the rest of the wait
    is for a worker.
    """
    merged = _merged(busy)
    ends = [end for _, end in merged]
    found = []
    for request in served:
        spent = 0
        for name, first, last in request.stages:
            if name in FORMING:
                start, end = request.start_ns + first, request.start_ns + last
                spent += end - start
                for since, until in merged[bisect_right(ends, start) :]:
                    if since >= end:
                        break
                    spent -= min(until, end) - max(since, start)
        found.append(spent / 1e6)
    return found


FORMING = ("queue.batch", "batch.wait")


def _merged(intervals: Sequence[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def union(intervals: Sequence[Interval]) -> int:
    """Return for how long at least one of *intervals* lasted, ns."""
    return sum(end - start for start, end in _merged(intervals))
