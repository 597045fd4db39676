"""The stage vocabulary, and the partition rule that charges every nanosecond to one stage.

The words are those of docs/attributes.md.
A sub-stage carries its stage before the first dot: `queue.threadpool` belongs to `queue`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol, TypeVar

STAGES = ("queue", "preprocess", "batch", "inference", "postprocess", "respond")
"""The six stages, in the order in which a request meets them."""

OTHER = "other"
"""What no stage claimed."""

SUB_STAGES = (
    "queue.ingress",
    "queue.threadpool",
    "queue.worker",
    "queue.batch",
    "preprocess.read",
    "preprocess.parse",
    "batch.wait",
    "batch.collate",
    "inference.h2d",
    "inference.forward",
    "inference.d2h",
    "postprocess.serialize",
    "respond.first_byte",
    "respond.stream",
)

KNOWN = (OTHER, *STAGES, *SUB_STAGES)
"""Names that every recorder file knows from its first byte on, in the order of their codes."""


IMPORTS, STARTUP, IDLE, FIRST_REQUEST = "imports", "startup", "idle", "first_request"
COLD_START_PARTS = (IMPORTS, STARTUP, IDLE, FIRST_REQUEST)
"""What a cold start is made of, one after the other; loads and the user's stages lie in them."""

LOAD = "load"
"""Loading a model: `load.torch`, `load.onnxruntime`, or the user's own `stage("load")`."""


def stage_of(name: str) -> str:
    """Return the stage that *name* (a stage or sub-stage) belongs to: `batch.wait` gives `batch`."""
    return name.partition(".")[0]


class StageSpan(NamedTuple):
    """One opening of a stage inside a timeline; times are nanoseconds since the timeline's start.

    `self_ns` is what the partition charges to this opening: its length less the time in which
    a stage opened later was open. A tuple, not a dataclass: a reader makes millions of them.
    """

    stage: str
    start_ns: int
    end_ns: int
    self_ns: int
    failed: bool = False
    open: bool = False
    """True when the process died, or the request ended, before the stage was closed."""


class Opened(Protocol):
    """Whatever was opened at some instant: a `StageSpan`, a capture's opening."""

    @property
    def start_ns(self) -> int:
        """When it was opened."""
        ...


OpenedT = TypeVar("OpenedT", bound=Opened)


def opened_last(open_now: Sequence[OpenedT]) -> OpenedT | None:
    """Return what is charged at an instant at which all of *open_now* are open; None of none.

    It is what was opened last; of two that were opened together, the later in the sequence.
    """
    return max(reversed(open_now), key=lambda one: one.start_ns, default=None)


def partition(intervals: Sequence[tuple[int, int]], duration_ns: int) -> tuple[list[int], int]:
    """Charge each instant of a timeline to the interval that `opened_last` names.

    *intervals* are (start_ns, end_ns) since the timeline's start, in the order of opening;
    where two start together the later in the sequence counts as opened last.
    Returns the nanoseconds charged to each interval, in the same order, and the rest (`other`).
    Everything together equals *duration_ns* to the nanosecond.
    """
    charged = [0] * len(intervals)
    events: list[tuple[int, int, bool]] = []
    for index, (start, end) in enumerate(intervals):
        start = 0 if start < 0 else start
        end = duration_ns if end > duration_ns else end
        if end > start:
            events.append((start, index, True))
            events.append((end, index, False))
    events.sort()
    other = last = 0
    stack: list[int] = []
    for at, index, opens in events:
        if stack:
            charged[stack[-1]] += at - last
        else:
            other += at - last
        last = at
        if opens:
            stack.append(index)
        elif stack[-1] == index:
            stack.pop()
        else:
            stack.remove(index)
    return charged, other + duration_ns - last


CAPTURE = "capture"
"""Cause of the stretch in which a profiler was at work: what overlaps it is *profiled*."""


class Stall(NamedTuple):
    """A time in which a whole process stood still; monotonic ns."""

    cause: str
    """`loop`: a callback of the event loop was late. `gc`: the garbage collector ran. `stopped`: the
    process was stopped from outside. `capture`:
    a profiler started, recorded, stopped or wrote its file; the process ran, but slower."""
    start_ns: int
    end_ns: int


class StageStall(NamedTuple):
    """What one opening of a stage was charged while stalls of one cause lasted."""

    opening: int
    """Its index in the request's stages; -1 for `other`."""
    stage: str
    cause: str
    stall_ns: int


TIMER_SLACK_NS = 1_100_000
"""Event loops sleep in whole milliseconds: a timer that is so late was not held up by anybody."""


class WaitFact(NamedTuple):
    """One fact from which waits are separated from work, see docs/waits.md."""

    kind: str
    """`ran` on an event loop; `ready` to go on, or its timer `due`, until the loop resumed it;
    `awaited` something that was ready at a moment not known; a `thread` worked for it; its thread
    was `queued` for a core, or `off` it for another cause, for as long in all, within the `ran` or
    `thread` of the same start; its loop was `busy` with code of
    no request; the garbage collector ran, `gc`, or the process was `stopped`."""
    loop: int
    """Number of the event loop within its process; -1: none. Of `off`: about how
    often the thread slept within it."""
    start_ns: int
    """Since the request's start; below 0 where it began before the request."""
    end_ns: int


def held_up(pause: str, facts: Iterable[WaitFact]) -> list[tuple[int, int]]:
    """Return when a *pause* of its process held a request up, by its *facts*, since its start.

    It did while the request ran or could have; a collection within what it awaits, until that is
    ready, costs it nothing. A process that is stopped for long takes no answer from outside.
    """
    kinds = {"ran", "ready", "due", "thread", "queued"}
    if pause == "stopped":
        kinds.add("awaited")
    joined: list[tuple[int, int]] = []
    for fact in sorted(facts, key=lambda fact: fact.start_ns):
        if fact.kind not in kinds:
            continue
        if joined and fact.start_ns <= joined[-1][1]:
            start, end = joined.pop()
            joined.append((start, max(end, fact.end_ns)))
        else:
            joined.append((fact.start_ns, fact.end_ns))
    return joined


class Charged:
    """What of a request's time is charged to a cause already; ns."""

    def __init__(self) -> None:
        self._taken: list[tuple[int, int]] = []

    def free(self, start: int, end: int) -> list[tuple[int, int]]:
        """Return what is not charged yet between *start* and *end*."""
        left: list[tuple[int, int]] = []
        for first, last in self._taken:
            if last <= start or first >= end:
                continue
            if first > start:
                left.append((start, first))
            start = max(start, last)
        if start < end:
            left.append((start, end))
        return left

    def take(self, start: int, end: int) -> list[tuple[int, int]]:
        """Charge what is free between *start* and *end*, and return it."""
        taken = self.free(start, end)
        self._taken = sorted([*self._taken, *taken])
        return taken


def overlap(
    stalls: Iterable[Stall], start_ns: int, duration_ns: int, stages: Iterable[StageSpan]
) -> tuple[StageStall, ...]:
    """Return what each opening of a request, and `other`, was charged during *stalls*.

    Exact for the stalls as given: the partition rule, applied to each stall's stretch alone.
    Stalls of two causes may overlap each other, so sums go by cause.
    """
    sums: dict[tuple[int, str], int] = {}
    spans = list(stages)
    for stall in stalls:
        begin = max(stall.start_ns - start_ns, 0)
        length = min(stall.end_ns - start_ns, duration_ns) - begin
        if length <= 0:
            continue
        times = [(max(0, span.start_ns - begin), span.end_ns - begin) for span in spans]
        charged, other = partition(times, length)
        for index, spent in [*enumerate(charged), (-1, other)]:
            if spent:
                key = index, stall.cause
                sums[key] = sums.get(key, 0) + spent
    return tuple(
        [
            StageStall(index, spans[index].stage if index >= 0 else OTHER, cause, spent)
            for (index, cause), spent in sorted(sums.items())
        ]
    )
