"""From the facts of all requests of a process to each request's waits; plain Python, no engine.

A wait is charged by the partition rule: to the stage that was charged meanwhile. Where causes
overlap, the first of CAUSES has it. docs/waits.md says why each rule is as it is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from stagescope.stages import OTHER, WaitFact

CAUSES = ("gc", "cpu", "event_loop", "gil")
"""In the order in which an instant is charged."""
NETWORK = "network.request"
"""Where the time between *sent* and the first line of the middleware is charged."""
TIMER_SLACK_NS = 1_100_000
"""Both loops sleep in whole milliseconds: a timer that is so late was not held up by anybody."""
GAP_NS = 300_000
"""The loop was busy all the time where what ran on it lies no further apart."""
LEAST_FREE = 5
"""So often a stage must have been seen alone, to tell from that what it takes."""
UNKNOWN_HOLDER = ""

Interval = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Served:
    """One request as its process recorded it; times are absolute, monotonic ns."""

    key: str
    """Its span id."""
    process: str
    start_ns: int
    duration_ns: int
    sent_ns: int
    """When the client sent it, on the same clock; `start_ns` where that is not known."""
    stages: Sequence[tuple[str, int, int]]
    """Full name, start and end, since `start_ns`, in the order of opening."""
    facts: Sequence[WaitFact]


@dataclass(slots=True)
class Charge:
    """A wait of one cause in one stage, ns."""

    ns: int = 0
    low_ns: int = 0
    high_ns: int = 0


@dataclass(slots=True)
class Waits:
    """The waits of one request."""

    charges: dict[tuple[str, str], Charge] = field(default_factory=lambda: defaultdict(Charge))
    """By full stage name and cause."""
    held: dict[tuple[str, str], int] = field(default_factory=lambda: defaultdict(int))
    """Wait for the event loop, ns, by the stage that waited and the one that held the loop."""


def segments(request: Served) -> list[tuple[int, int, str]]:
    """Return which stage is charged when, from *sent* on, one after the other; absolute times."""
    start = request.start_ns
    found = [(request.sent_ns, start, NETWORK)] if request.sent_ns < start else []
    events = [(0, -1, False), (request.duration_ns, -1, False)]
    for index, (_, first, last) in enumerate(request.stages):
        if 0 <= first < last:
            events += [(first, index, True), (min(last, request.duration_ns), index, False)]
    events.sort()
    still_open: list[int] = []
    since = 0
    for at, index, opens in events:
        if at > since:
            name = request.stages[still_open[-1]][0] if still_open else OTHER
            found.append((start + since, start + at, name))
            since = at
        if opens:
            still_open.append(index)
        elif index in still_open:
            still_open.remove(index)
    return found


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


class Claims:
    """What of a request's time is charged to a cause already."""

    def __init__(self) -> None:
        self._taken: list[Interval] = []

    def free(self, start: int, end: int) -> list[Interval]:
        """Return what is not charged yet between *start* and *end*."""
        left: list[Interval] = []
        for first, last in self._taken:
            if last <= start or first >= end:
                continue
            if first > start:
                left.append((start, first))
            start = max(start, last)
        if start < end:
            left.append((start, end))
        return left

    def take(self, start: int, end: int) -> list[Interval]:
        """Charge what is free between *start* and *end*, and return it."""
        taken = self.free(start, end)
        self._taken = sorted([*self._taken, *taken])
        return taken


def split(requests: Sequence[Served]) -> dict[str, Waits]:
    """Return each request's waits, by its key; one without waits has an empty one."""
    by_process: dict[str, list[Served]] = defaultdict(list)
    for request in requests:
        by_process[request.process].append(request)
    found: dict[str, Waits] = {}
    for served in by_process.values():
        found |= _Process(served).split()
    return found


class _Process:
    def __init__(self, requests: Sequence[Served]) -> None:
        self._requests = requests
        self._segments = {request.key: segments(request) for request in requests}
        self._loops = self._occupancies()
        self._collections = {
            (request.start_ns + fact.start_ns, request.start_ns + fact.end_ns)
            for request in requests
            for fact in request.facts
            if fact.kind == "gc"
        }
        self._free_awaits = self._seen_free()
        self._free_gaps = self._seen_free_gaps()
        self._off = _OffCore(requests, self._segments)

    def _occupancies(self) -> dict[int, Occupancy]:
        ran: dict[int, list[tuple[int, int, str, str]]] = defaultdict(list)
        for request in self._requests:
            parts = self._segments[request.key]
            works = {fact.start_ns for fact in request.facts if fact.kind in ("ran", "thread")}
            number = next((fact.loop for fact in request.facts if fact.kind == "ran"), -1)
            for fact in request.facts:
                if fact.kind == "queued" and fact.start_ns not in works:
                    # The loop had something to do and no core: it was not free for others.
                    bounds = (request.start_ns + fact.start_ns, request.start_ns + fact.end_ns)
                    ran[number].append((*bounds, UNKNOWN_HOLDER, request.key))
                elif fact.kind == "ran":
                    start = request.start_ns + fact.start_ns
                    for first, last, stage in _cut(parts, start, request.start_ns + fact.end_ns):
                        ran[fact.loop].append((first, last, stage, request.key))
        return {loop: Occupancy(stretches) for loop, stretches in ran.items()}

    def _loop(self, number: int) -> Occupancy:
        return self._loops.get(number) or Occupancy([])

    def _own_loop(self, request: Served) -> Occupancy:
        numbers = (fact.loop for fact in request.facts if fact.kind == "ran")
        return self._loop(next(numbers, -1))

    def _seen_free(self) -> dict[str, int]:
        """Return by stage what it awaited from outside, typically, while the loop was free."""
        seen: dict[str, list[int]] = defaultdict(list)
        for request in self._requests:
            for fact in request.facts:
                if fact.kind == "awaited":
                    start, end = request.start_ns + fact.start_ns, request.start_ns + fact.end_ns
                    if self._loop(fact.loop).busy_since(start, end, request.key) == end:
                        seen[_stage_at(self._segments[request.key], start)].append(end - start)
        return {
            stage: round(median(all_)) for stage, all_ in seen.items() if len(all_) >= LEAST_FREE
        }

    def _seen_free_gaps(self) -> int:
        gaps = [
            request.start_ns - request.sent_ns
            for request in self._requests
            if request.sent_ns < request.start_ns
            and not self._own_loop(request).holders(request.sent_ns, request.start_ns, request.key)
        ]
        return round(median(gaps)) if len(gaps) >= LEAST_FREE else 0

    def split(self) -> dict[str, Waits]:
        collections = sorted(self._collections)
        begins = [start for start, _ in collections]
        longest = max((end - start for start, end in collections), default=0)
        found: dict[str, Waits] = {}
        for request in self._requests:
            first = bisect_left(begins, request.sent_ns - longest)
            last = bisect_right(begins, request.start_ns + request.duration_ns)
            found[request.key] = self._of(request, collections[first:last])
        return found

    def _of(self, request: Served, collections: Sequence[Interval]) -> Waits:
        one = _Request(request, self._segments[request.key])
        for start, end in collections:
            one.exact("gc", start, end)
        works = {f.start_ns: f for f in request.facts if f.kind in ("ran", "thread")}
        for fact in request.facts:
            if fact.kind == "queued":
                inside = works.get(fact.start_ns)
                if inside is None:
                    one.exact("cpu", one.at(fact.start_ns), one.at(fact.end_ns))
                else:
                    amount = fact.end_ns - fact.start_ns
                    one.spread("cpu", inside, amount, amount, amount)
        for fact in request.facts:
            if fact.kind in ("ready", "due", "awaited"):
                self._loop_wait(one, fact)
        if request.sent_ns < request.start_ns:
            self._before_first_line(one)
        for inside, estimate, high in self._off.gil(request, works):
            one.spread("gil", inside, estimate, 0, high)
        return one.waits

    def _loop_wait(self, one: _Request, fact: WaitFact) -> None:
        loop, start, end = self._loop(fact.loop), one.at(fact.start_ns), one.at(fact.end_ns)
        if fact.kind == "ready":
            one.loop(loop, start, end)
        elif fact.kind == "due":
            late = end - start
            known = sum(loop.holders(start, end, one.key).values())
            one.loop(loop, end - max(min(known, late), late - TIMER_SLACK_NS, 0), end)
        else:
            since = loop.busy_since(start, end, one.key)
            if since < end:
                usual = self._free_awaits.get(_stage_at(one.parts, start), end - start)
                ready = min(max(start + usual, since), end)
                one.loop(loop, ready, end, low_from=end, high_from=since)

    def _before_first_line(self, one: _Request) -> None:
        """The network has what the loop was free for, or what it takes when the loop is free."""
        start, end = one.request.sent_ns, one.request.start_ns
        loop = self._own_loop(one.request)
        held = sum(loop.holders(start, end, one.key).values()) + loop.breaks(start, end)
        free = max(end - start - held, min(self._free_gaps, end - start))
        if held:
            one.loop(loop, start + free, end, low_from=end, high_from=end - held)


class _Request:
    """Charges the waits of one request."""

    def __init__(self, request: Served, parts: Sequence[tuple[int, int, str]]) -> None:
        self.request = request
        self.key = request.key
        self.parts = parts
        self.waits = Waits()
        self._claims = Claims()
        self._start_ns = request.start_ns

    def at(self, since_start_ns: int) -> int:
        return self._start_ns + since_start_ns

    def exact(self, cause: str, start: int, end: int) -> None:
        """Charge the whole of an interval."""
        for first, last in self._claims.take(start, end):
            for begin, stop, stage in _cut(self.parts, first, last):
                self._charge(stage, cause, stop - begin, stop - begin, stop - begin)

    def loop(
        self,
        loop: Occupancy,
        start: int,
        end: int,
        low_from: int | None = None,
        high_from: int | None = None,
    ) -> None:
        """Charge a wait for *loop*: from *start*, at the latest *low_from*, earliest *high_from*."""
        late = start if low_from is None else low_from
        early = start if high_from is None else high_from
        for first, last in self._claims.free(early, end):
            for begin, stop, stage in _cut(self.parts, first, last):
                estimate = max(0, stop - max(begin, start))
                low = max(0, stop - max(begin, late))
                self._charge(stage, "event_loop", estimate, low, stop - begin)
                if estimate:
                    known = 0
                    for holder, spent in loop.holders(max(begin, start), stop, self.key).items():
                        if holder != UNKNOWN_HOLDER:
                            self.waits.held[stage, holder] += spent
                            known += spent
                    if estimate > known:
                        self.waits.held[stage, UNKNOWN_HOLDER] += estimate - known
        self._claims.take(start, end)

    def spread(self, cause: str, inside: WaitFact, ns: int, low_ns: int, high_ns: int) -> None:
        """Charge a wait that lay somewhere within *inside*: over its stages, by their length."""
        parts = [
            part
            for first, last in self._claims.free(self.at(inside.start_ns), self.at(inside.end_ns))
            for part in _cut(self.parts, first, last)
        ]
        free = sum(last - first for first, last, _ in parts)
        if not free:
            return
        # It may have lain in what is charged already (a collection that had no core) as well.
        whole = inside.end_ns - inside.start_ns
        amounts = (
            min(ns, whole) * free // whole,
            max(0, low_ns - (whole - free)),
            min(high_ns, free),
        )
        for first, last, stage in parts:
            share = last - first
            self._charge(stage, cause, *(amount * share // free for amount in amounts))

    def _charge(self, stage: str, cause: str, ns: int, low_ns: int, high_ns: int) -> None:
        if high_ns <= 0:
            return
        charge = self.waits.charges[stage, cause]
        charge.ns += ns
        charge.low_ns += low_ns
        charge.high_ns += high_ns


class _OffCore:
    """Time in which a thread was off its core and not queued: a lock, or a call that blocks.

    At most as much of it as other threads of the process were on a core meanwhile was a wait for
    the interpreter's lock. The estimate is what goes beyond what the same stage is off its core
    for when no other thread is at work; where it was never seen alone, the stage keeps it.
    """

    def __init__(
        self, requests: Sequence[Served], parts: dict[str, list[tuple[int, int, str]]]
    ) -> None:
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
        return f"{fact.kind} {_stage_at(self._parts[request.key], middle)}"

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


def _cut(parts: Sequence[tuple[int, int, str]], start: int, end: int) -> list[tuple[int, int, str]]:
    """Return the parts between *start* and *end*, cut at both."""
    return [
        (max(first, start), min(last, end), stage)
        for first, last, stage in parts
        if last > start and first < end
    ]


def _stage_at(parts: Sequence[tuple[int, int, str]], at: int) -> str:
    return next((stage for first, last, stage in parts if first <= at < last), OTHER)
