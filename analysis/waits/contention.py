"""Who else was at work meanwhile: on the same event loop, and on other threads of the process."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from statistics import median

from stagescope.analysis.waits.requests import LEAST_FREE, Interval, Part, Served, stage_at

GAP_NS = 300_000
"""The loop was busy all the time where what ran on it lies no further apart."""
SWITCH_NS = 5_000_000
"""A thread that computes gives the interpreter's lock to one that waits after so long."""


class Occupancy:
    """Who was at work on one event loop when; one at a time, so its stretches do not overlap."""

    def __init__(self, stretches: list[tuple[int, int, str, str]]) -> None:
        """*stretches* are start, end, stage and the key of its request.

        Of two that overlap, since one is known by its amount only, the later one is cut.
        """
        self._stretches: list[tuple[int, int, str, str]] = []
        last = 0
        for start, end, stage, key in sorted(stretches):
            if end > last:
                self._stretches.append((max(start, last), end, stage, key))
                last = end
        self._starts = [stretch[0] for stretch in self._stretches]
        self._ends = [stretch[1] for stretch in self._stretches]

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

    def breaks(self, start: int, end: int, longest_ns: int = GAP_NS) -> int:
        """Return the short times between one stretch and the next: the server's own code ran."""
        between = self._between(start, end)
        gaps = (later[0] - earlier[1] for earlier, later in pairwise(between))
        return sum(gap for gap in gaps if 0 < gap <= longest_ns)

    def busy_since(self, start: int, end: int, key: str, break_ns: int = GAP_NS) -> int:
        """Return since when, at *start* or later, others held it until *end*, no break longer."""
        since = end
        for first, last, _, owner in reversed(self._between(start, end)):
            if owner == key or last < since - break_ns:
                break
            since = first
        return max(since, start)


@dataclass(frozen=True, slots=True)
class Work:
    """A stretch in which one thread was at work for a request."""

    start: int
    end: int
    owners: frozenset[str]
    """The keys of the requests: of a batch several."""
    name: str
    """Kind of thread, and the stage in the middle."""
    on_loop: bool
    off: int
    """For how long it was off its core, and in no run queue."""
    computed: int
    times: int
    """About how often it slept."""

    @property
    def share(self) -> float:
        """Of its time, what it computed or could have."""
        return 1 - min(self.off / (self.end - self.start), 1)

    @property
    def yields(self) -> int:
        """How often it gave the interpreter's lock up at least, where others wanted it."""
        return self.computed // SWITCH_NS


class OffCore:
    """Time in which a thread was off its core and not queued: a lock, or a call that blocks.

    At most as much of it was a wait for the interpreter's lock as other threads of the process
    computed meanwhile, and SWITCH_NS each time that it slept: who waits for the lock looks again
    so often. The estimate is what goes beyond what the same stage is off its core for by itself,
    and at most SWITCH_NS for all sleeps but one; half of it where one other thread computes, for
    then the lock is there at the second look.
    """

    def __init__(self, requests: Sequence[Served], parts: Mapping[str, Sequence[Part]]) -> None:
        self._parts = parts
        apart: dict[tuple[int, ...], Work] = {}
        for work in (work for request in requests for work in self._works(request)):
            of = work.start, work.end, work.on_loop, work.off, work.computed, work.times
            shared = apart[of].owners if of in apart else frozenset[str]()
            apart[of] = replace(work, owners=work.owners | shared)
        self._work = sorted(apart.values(), key=lambda work: work.start)
        self._starts = [work.start for work in self._work]
        self._longest = max((work.end - work.start for work in self._work), default=0)
        self._usual = self._by_itself()

    def _works(self, request: Served) -> Iterable[Work]:
        off = {f.start_ns: f for f in request.facts if f.kind == "off"}
        queued = {f.start_ns: f.end_ns - f.start_ns for f in request.facts if f.kind == "queued"}
        for fact in request.facts:
            length = fact.end_ns - fact.start_ns
            if fact.kind not in ("ran", "thread") or length <= 0:
                continue
            start = request.start_ns + fact.start_ns
            blocked = off.get(fact.start_ns)
            spent = blocked.end_ns - blocked.start_ns if blocked else 0
            yield Work(
                start, start + length, frozenset({request.key}),
                f"{fact.kind} {stage_at(self._parts[request.key], start + length // 2)}",
                fact.kind == "ran", spent, length - spent - queued.get(fact.start_ns, 0),
                blocked.loop if blocked else 0,
            )  # fmt: skip

    def _others(self, start: int, end: int, key: str) -> Iterable[tuple[Work, int]]:
        first = bisect_left(self._starts, start - self._longest)
        last = bisect_left(self._starts, end)
        for work in self._work[first:last]:
            if key not in work.owners and work.end > start:
                yield work, min(work.end, end) - max(work.start, start)

    def computing(self, start: int, end: int, key: str, *, steps: bool = False) -> int:
        """Return for how much of an interval threads of requests other than *key* computed.

        Those of worker threads; with *steps* also the event loops'.
        """
        others = self._others(start, end, key)
        spent = sum(both * work.share for work, both in others if steps or not work.on_loop)
        return min(round(spent), end - start)

    def _contenders(self, work: Work) -> float:
        """Return how many other threads at a time computed for long, 1 at least."""
        others = self._others(work.start, work.end, next(iter(work.owners)))
        together = sum(both for other, both in others if other.yields)
        return max(1.0, together / (work.end - work.start))

    def _by_itself(self) -> dict[str, int]:
        """Return by name for how long a thread is off its core when it waits for no lock.

        From those that no other thread computed beside; where there were none, from those that
        were off least, less what they gave up for others at least.
        """
        alone: dict[str, list[int]] = defaultdict(list)
        beside: dict[str, list[int]] = defaultdict(list)
        for work in self._work:
            others = self.computing(work.start, work.end, next(iter(work.owners)), steps=True)
            if others:
                given = min(work.yields * SWITCH_NS, others)
                beside[work.name].append(max(0, work.off - given))
            else:
                alone[work.name].append(work.off)
        return {
            name: round(median(sorted(all_)[:LEAST_FREE]))
            for name, all_ in beside.items()
            if len(all_) >= LEAST_FREE
        } | {name: round(median(all_)) for name, all_ in alone.items() if len(all_) >= LEAST_FREE}

    def gil(self, request: Served, stops: Sequence[Interval]) -> Iterable[tuple[Work, int, int]]:
        """Yield where *request* may have waited for the lock: estimate and upper bound, ns.

        While the process was stopped it waited for no lock.
        """
        for work in self._works(request):
            off = work.off - sum(
                max(0, min(last, work.end) - max(first, work.start)) for first, last in stops
            )
            computing = self.computing(work.start, work.end, request.key, steps=True)
            high = min(off, computing, (work.times + 1) * SWITCH_NS)
            if high > 0:
                others = self._contenders(work)
                likely = max(work.times - 1, 1) * SWITCH_NS * min(others / 2, 1.0)
                if not work.yields:  # Else it slept for the lock alone, all the time.
                    likely *= computing / (work.end - work.start)
                beyond = off - self._usual.get(work.name, off)
                yield work, max(0, min(beyond, high, round(likely))), high
