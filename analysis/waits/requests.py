"""What a request is to the analysis of waits: its stages, its facts, and the waits found in it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from stagescope.stages import OTHER, WaitFact

NETWORK = "network.request"
"""Where the time between *sent* and the first line of the middleware is charged."""
LEAST_FREE = 5
"""So often a stage must have been seen alone, to tell from that what it takes."""

Interval = tuple[int, int]
Part = tuple[int, int, str]
"""Start and end, absolute, and the stage that was charged from one to the other."""


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


def segments(request: Served) -> list[Part]:
    """Return which stage is charged when, from *sent* on, one after the other; absolute times."""
    start = request.start_ns
    found = [(request.sent_ns, start, NETWORK)] if request.sent_ns < start else []
    events = [(0, -1, False), (request.duration_ns, -1, False)]
    for index, (_, first, last) in enumerate(request.stages):
        first, last = max(0, first), min(last, request.duration_ns)
        if first < last:
            events += [(first, index, True), (last, index, False)]
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


def cut(parts: Sequence[Part], start: int, end: int) -> list[Part]:
    """Return the parts between *start* and *end*, cut at both."""
    return [
        (max(first, start), min(last, end), stage)
        for first, last, stage in parts
        if last > start and first < end
    ]


def stage_at(parts: Sequence[Part], at: int) -> str:
    """Return the stage that was charged at an instant."""
    return next((stage for first, last, stage in parts if first <= at < last), OTHER)


def most_at_once(times: Iterable[Interval], scatter_ns: int = 0) -> int:
    """Return how many of *times* overlap at most, by more than *scatter_ns*."""
    cut_off = ((start, max(start + 1, end - scatter_ns)) for start, end in times)
    events = sorted(event for start, end in cut_off for event in ((start, 1), (end, -1)))
    now = most = 0
    for _, step in events:
        now += step
        most = max(most, now)
    return most
