"""From the facts of all requests of a process to each request's waits; plain Python, no engine.

A wait is charged by the partition rule: to the stage that was charged meanwhile. Where causes
overlap, the first of CAUSES has it. docs/waits.md says why each rule is as it is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import NamedTuple

from stagescope.analysis.waits.contention import SWITCH_NS, Occupancy, OffCore
from stagescope.analysis.waits.requests import (
    LEAST_FREE,
    Interval,
    Part,
    Served,
    Waits,
    cut,
    segments,
    stage_at,
)
from stagescope.stages import TIMER_SLACK_NS, Charged, WaitFact, held_up

CAUSES = ("stopped", "gc", "cpu", "event_loop", "gil")
"""In the order in which an instant is charged."""
PAUSES = CAUSES[:2]
"""Those that hold up all threads of a process."""
UNKNOWN_HOLDER = ""
IDLE_NS = 20_000_000
"""A loop on which nothing ran for so long idled; in a shorter break the server's own code may have
run, or have waited for a core."""


def split(requests: Sequence[Served]) -> dict[str, Waits]:
    """Return each request's waits, by its key; one without waits has an empty one."""
    by_process: dict[str, list[Served]] = defaultdict(list)
    for request in requests:
        by_process[request.process].append(request)
    found: dict[str, Waits] = {}
    for served in by_process.values():
        found |= _Process(served).split()
    return found


class Await(NamedTuple):
    """Something outside that a request awaited from *start* to *end*."""

    loop: Occupancy
    start: int
    surely: int
    """It was not ready before, for the loop idled until then."""
    since: int
    """From here on others held the loop: it was hardly ready before, for the loop had a break."""
    end: int


class _Process:
    def __init__(self, requests: Sequence[Served]) -> None:
        self._requests = requests
        self._segments = {request.key: segments(request) for request in requests}
        self._loops = self._occupancies()
        self._pauses = {cause: _Pauses(requests, cause) for cause in PAUSES}
        self._off = OffCore(requests, self._segments)
        self._awaited = {request.key: self._awaits(request) for request in requests}
        self._usual_awaits = self._seen_awaits()
        self._free_gaps = self._seen_free_gaps()
        self._slack = self._timers_slack()

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
                elif fact.kind == "busy":
                    bounds = (request.start_ns + fact.start_ns, request.start_ns + fact.end_ns)
                    ran[fact.loop].append((*bounds, UNKNOWN_HOLDER, ""))
                elif fact.kind == "ran":
                    start = request.start_ns + fact.start_ns
                    for first, last, stage in cut(parts, start, request.start_ns + fact.end_ns):
                        ran[fact.loop].append((first, last, stage, request.key))
        return {loop: Occupancy(stretches) for loop, stretches in ran.items()}

    def _loop(self, number: int) -> Occupancy:
        return self._loops.get(number) or Occupancy([])

    def _own_loop(self, request: Served) -> Occupancy:
        numbers = (fact.loop for fact in request.facts if fact.kind == "ran")
        return self._loop(next(numbers, -1))

    def _awaits(self, request: Served) -> dict[str, list[Await]]:
        """Return by stage what *request* awaited from outside, and how it could have been ready."""
        found: dict[str, list[Await]] = defaultdict(list)
        for fact in request.facts:
            if fact.kind == "awaited":
                start, end = request.start_ns + fact.start_ns, request.start_ns + fact.end_ns
                loop = self._loop(fact.loop)
                surely = loop.busy_since(start, end, request.key, IDLE_NS)
                since = loop.busy_since(start, end, request.key)
                stage = stage_at(self._segments[request.key], start)
                found[stage].append(Await(loop, start, surely, since, end))
        return found

    def _seen_awaits(self) -> dict[tuple[str, int], int]:
        """Return how long the first, second, ... thing takes that a stage awaits from outside.

        From those that found the loop free; where they are few, from those that took least.
        """
        free: dict[tuple[str, int], list[int]] = defaultdict(list)
        all_: dict[tuple[str, int], list[int]] = defaultdict(list)
        for by_stage in self._awaited.values():
            for stage, awaits in by_stage.items():
                for index, one in enumerate(awaits):
                    all_[stage, index].append(one.end - one.start)
                    if one.since == one.end:
                        free[stage, index].append(one.end - one.start)
        return {
            which: round(median(sorted(lengths)[:LEAST_FREE]))
            for which, lengths in all_.items()
            if len(lengths) >= LEAST_FREE
        } | {which: round(median(seen)) for which, seen in free.items() if len(seen) >= LEAST_FREE}

    def _seen_free_gaps(self) -> int:
        gaps = [
            request.start_ns - request.sent_ns
            for request in self._requests
            if request.sent_ns < request.start_ns
            and not self._own_loop(request).holders(request.sent_ns, request.start_ns, request.key)
            and not self._off.computing(request.sent_ns, request.start_ns, request.key)
        ]
        return round(median(gaps)) if len(gaps) >= LEAST_FREE else 0

    def _timers_slack(self) -> int:
        """Return by how much timers come late, typically, that nobody holds up."""
        late = [
            end - start
            for request in self._requests
            for fact in request.facts
            if fact.kind == "due"
            for start, end in ((request.start_ns + fact.start_ns, request.start_ns + fact.end_ns),)
            if not self._loop(fact.loop).holders(start, end, request.key)
            and not self._off.computing(start, end, request.key)
        ]
        usual = round(median(late)) if len(late) >= LEAST_FREE else TIMER_SLACK_NS // 2
        return min(usual, TIMER_SLACK_NS)

    def split(self) -> dict[str, Waits]:
        return {request.key: self._of(request) for request in self._requests}

    def _of(self, request: Served) -> Waits:
        one = _Request(request, self._segments[request.key])
        for cause, pauses in self._pauses.items():
            held = [(one.at(start), one.at(end)) for start, end in held_up(cause, request.facts)]
            held.append((request.sent_ns, request.start_ns))
            for (start, end), (first, last) in product(pauses.during(request), held):
                one.exact(cause, max(start, first), min(end, last))
        works = {f.start_ns: f for f in request.facts if f.kind in ("ran", "thread")}
        for fact in request.facts:
            if fact.kind == "queued":
                inside = works.get(fact.start_ns)
                if inside is None:
                    one.exact("cpu", one.at(fact.start_ns), one.at(fact.end_ns))
                else:
                    amount = fact.end_ns - fact.start_ns
                    within = one.at(inside.start_ns), one.at(inside.end_ns)
                    one.spread("cpu", within, amount, amount, amount)
        for fact in request.facts:
            if fact.kind in ("ready", "due"):
                self._loop_wait(one, fact)
        for stage, awaits in self._awaited[request.key].items():
            self._charge_awaits(one, stage, awaits)
        if request.sent_ns < request.start_ns:
            self._before_first_line(one)
        stops = self._pauses["stopped"].during(request)
        for work, estimate, high in self._off.gil(request, stops):
            one.spread("gil", (work.start, work.end), estimate, 0, high)
        return one.waits

    def _loop_wait(self, one: _Request, fact: WaitFact) -> None:
        loop, start, end = self._loop(fact.loop), one.at(fact.start_ns), one.at(fact.end_ns)
        late, early = start, start
        if fact.kind == "due":
            # A timer that nobody holds up is late too: but for what is known to have held it up.
            held = sum(loop.holders(start, end, one.key).values())
            late = max(start, min(start + TIMER_SLACK_NS, end - held))
            start = max(start, min(start + self._slack, end - held)) if held else late
            early = early if held else late
        if locked := self._locked(one, loop, start, end):
            early = start = one.lock(start, locked)
        one.loop(loop, start, end, max(late, start), early)

    def _charge_awaits(self, one: _Request, stage: str, awaits: Sequence[Await]) -> None:
        """Charge what *one* waited for the loop after each thing from outside, in one stage.

        It was not ready while the loop was free, so the rest of what is usual lay in the time in
        which the loop was held. Where nothing is known of the usual, half of that time.
        """
        for index, each in enumerate(awaits):
            waited, unsure = each.since - each.start, each.end - each.since
            usual = self._usual_awaits.get((stage, index), waited + unsure // 2)
            ready = each.since + min(max(usual - waited, 0), unsure)
            one.loop(each.loop, ready, each.end, low_from=each.end, high_from=each.surely)

    def _before_first_line(self, one: _Request) -> None:
        """The network has what the loop was free for, or what it takes when the loop is free."""
        start, end = one.request.sent_ns, one.request.start_ns
        loop = self._own_loop(one.request)
        # It has something to do, so its breaks are no sleep: its own code, or the lock.
        breaks = loop.breaks(start, end, SWITCH_NS)
        held = sum(loop.holders(start, end, one.key).values()) + breaks
        usual = min(self._free_gaps, end - start)
        locked = self._locked(one, loop, start + usual, end)
        free = max(end - start - held - locked, usual)
        start = one.lock(start + free, min(locked, end - start - free))
        if held:
            one.loop(loop, start, end, low_from=end, high_from=min(start, end - held))

    def _locked(self, one: _Request, loop: Occupancy, start: int, end: int) -> int:
        """Return for how long, while nothing ran on *loop*, other threads kept it from running."""
        held = sum(loop.holders(start, end, one.key).values()) + loop.breaks(start, end)
        return min(max(0, end - start - held), self._off.computing(start, end, one.key))


class _Pauses:
    """When the whole process stood still for one cause."""

    def __init__(self, requests: Sequence[Served], cause: str) -> None:
        self._times: list[Interval] = sorted(
            {
                (request.start_ns + fact.start_ns, request.start_ns + fact.end_ns)
                for request in requests
                for fact in request.facts
                if fact.kind == cause
            }
        )
        self._starts = [start for start, _ in self._times]
        self._longest = max((end - start for start, end in self._times), default=0)

    def during(self, request: Served) -> list[Interval]:
        """Return those that *request* may have met."""
        first = bisect_left(self._starts, request.sent_ns - self._longest)
        last = bisect_right(self._starts, request.start_ns + request.duration_ns)
        return self._times[first:last]


class _Request:
    """Charges the waits of one request."""

    def __init__(self, request: Served, parts: Sequence[Part]) -> None:
        self.request = request
        self.key = request.key
        self.parts = parts
        self.waits = Waits()
        self._claims = Charged()
        self._start_ns = request.start_ns
        self._ran: list[Interval] = sorted(
            (self.at(fact.start_ns), self.at(fact.end_ns))
            for fact in request.facts
            if fact.kind in ("ran", "thread")
        )
        """When one of its own tasks ran: another that waits meanwhile waits for the request itself."""

    def at(self, since_start_ns: int) -> int:
        return self._start_ns + since_start_ns

    def exact(self, cause: str, start: int, end: int) -> None:
        """Charge the whole of an interval, which may be empty."""
        for first, last in self._claims.take(start, end) if start < end else ():
            for begin, stop, stage in cut(self.parts, first, last):
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
        for first, last in self._waited(early, end):
            for begin, stop, stage in cut(self.parts, first, last):
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
        for first, last in self._waited(start, end):
            self._claims.take(first, last)

    def _waited(self, start: int, end: int) -> list[Interval]:
        """Return what is not charged yet, and in which it did not run itself, between the two."""
        found: list[Interval] = []
        for first, last in self._claims.free(start, end):
            # Steps are one after the other on their loop, so the one before may reach into it.
            for begin, stop in self._ran[max(0, bisect_right(self._ran, (first, 0)) - 1) :]:
                if begin >= last:
                    break
                if begin > first:
                    found.append((first, begin))
                first = max(first, stop)
            if first < last:
                found.append((first, last))
        return found

    def lock(self, start: int, ns: int) -> int:
        """Charge *ns* from *start* on to the interpreter's lock, an estimate; return their end."""
        for first, last in self._waited(start, start + ns):
            self._claims.take(first, last)
            for begin, stop, stage in cut(self.parts, first, last):
                self._charge(stage, "gil", stop - begin, 0, stop - begin)
        return start + ns

    def spread(self, cause: str, inside: Interval, ns: int, low_ns: int, high_ns: int) -> None:
        """Charge a wait that lay somewhere within *inside*: over its stages, by their length."""
        parts = [
            part
            for first, last in self._claims.free(*inside)
            for part in cut(self.parts, first, last)
        ]
        free = sum(last - first for first, last, _ in parts)
        if not free:
            return
        # It may have lain in what is charged already (a collection that had no core) as well.
        whole = inside[1] - inside[0]
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
