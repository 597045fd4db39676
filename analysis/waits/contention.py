"""Who else was at work meanwhile: on the same event loop, and on other threads of the process."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from statistics import median

from stagescope.analysis.waits.requests import LEAST_FREE, Part, Served, stage_at
from stagescope.stages import WaitFact

GAP_NS = 300_000
"""The loop was busy all the time where what ran on it lies no further apart."""


class Occupancy:
    """Who was at work on one event loop when; one at a time, so its stretches do not overlap."""

    def __init__(self, stretches: list[tuple[int, int, str, str]]) -> None:
        """*stretches* are start, end, stage and the key of its request."""
        stretches.sort()
        self._stretches = stretches
        self._starts = [stretch[0] for stretch in stretches]
        self._ends = [stretch[1] for stretch in stretches]

    def _between(self, start: int, end: int) -> list[tuple[int, int, str, str]]:
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        return self._stretches[first:last]

    def holders(self, start: int, end: int, key: str) -> dict[str, int]:
        """Return for how long each stage of requests other than *key* held it in between."""
        sums: dict[str, int] = defaultdict(int)
        for first, last, stage, owner in self._between(start, end):
            if owner != key:
                sums[stage] += min(last, end) - max(first, start)
        return sums

    def breaks(self, start: int, end: int) -> int:
        """Return the short times between one stretch and the next: the server's own code ran."""
        between = self._between(start, end)
        gaps = (later[0] - earlier[1] for earlier, later in pairwise(between))
        return sum(gap for gap in gaps if 0 < gap <= GAP_NS)

    def busy_since(self, start: int, end: int, key: str) -> int:
        """Return since when, at *start* or later, others held it without a break until *end*."""
        since = end
        for first, last, _, owner in reversed(self._between(start, end)):
            if owner == key or last < since - GAP_NS:
                break
            since = first
        return max(since, start)


class OffCore:
    """Time in which a thread was off its core and not queued: a lock, or a call that blocks.

    At most as much of it as other threads of the process were on a core meanwhile was a wait for
    the interpreter's lock. The estimate is what goes beyond what the same stage is off its core
    for when no other thread is at work; where it was never seen alone, the stage keeps it.
    """

    def __init__(self, requests: Sequence[Served], parts: Mapping[str, Sequence[Part]]) -> None:
        self._parts = parts
        work: list[tuple[int, int, str, str]] = []
        for request in requests:
            for fact in request.facts:
                if fact.kind in ("ran", "thread"):
                    start = request.start_ns + fact.start_ns
                    work.append((start, request.start_ns + fact.end_ns, fact.kind, request.key))
        self._work = sorted(work)
        self._starts = [start for start, _, _, _ in self._work]
        self._longest = max((end - start for start, end, _, _ in work), default=0)
        self._alone = self._seen_alone(requests)

    def _others(self, start: int, end: int, key: str) -> int:
        """Return for how much of an interval others were at work, each once."""
        first = bisect_left(self._starts, start - self._longest)
        last = bisect_left(self._starts, end)
        spent = 0
        for begin, stop, _, owner in self._work[first:last]:
            if owner != key:
                spent += max(0, min(stop, end) - max(begin, start))
        return spent

    def _seen_alone(self, requests: Sequence[Served]) -> dict[str, int]:
        seen: dict[str, list[int]] = defaultdict(list)
        for request in requests:
            off = {f.start_ns: f.end_ns - f.start_ns for f in request.facts if f.kind == "off"}
            for fact in request.facts:
                if fact.kind in ("ran", "thread"):
                    start, end = request.start_ns + fact.start_ns, request.start_ns + fact.end_ns
                    if not self._others(start, end, request.key):
                        seen[self._name(request, fact)].append(off.get(fact.start_ns, 0))
        return {name: round(median(all_)) for name, all_ in seen.items() if len(all_) >= LEAST_FREE}

    def _name(self, request: Served, fact: WaitFact) -> str:
        middle = request.start_ns + (fact.start_ns + fact.end_ns) // 2
        return f"{fact.kind} {stage_at(self._parts[request.key], middle)}"

    def gil(
        self, request: Served, works: dict[int, WaitFact]
    ) -> Iterable[tuple[WaitFact, int, int]]:
        """Yield where *request* may have waited for the lock: estimate and upper bound, ns."""
        for fact in request.facts:
            inside = works.get(fact.start_ns)
            if fact.kind != "off" or inside is None:
                continue
            start, end = request.start_ns + inside.start_ns, request.start_ns + inside.end_ns
            off = fact.end_ns - fact.start_ns
            high = min(off, self._others(start, end, request.key))
            usual = self._alone.get(self._name(request, inside), off)
            if high > 0:
                yield inside, min(max(0, off - usual), high), high
