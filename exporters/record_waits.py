"""What a request of a load run waited for, as far as its own record tells.

`stagescope report` holds all requests of a run against each other, and knows more: who held the
loop, the interpreter's lock, the wait after something outside the process. Here a wait is what is
certain from one record, so it is a least, and the own time that is left of a stage is a most.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from stagescope.records import RequestRecord
from stagescope.stages import (
    TIMER_SLACK_NS,
    Charged,
    StageStall,
    Stall,
    WaitFact,
    held_up,
    overlap,
)

CAUSES = ("stopped", "gc", "cpu", "event_loop")
"""In the order in which an instant is charged."""

_OF_PROCESS = ("stopped", "gc")
"""Known of every request that names a run, also where its steps were not watched."""


def waits_of(record: RequestRecord) -> tuple[StageStall, ...] | None:
    """Return what each opening of a stage, and `other`, waited for; None where it is not known."""
    if all(fact.kind in _OF_PROCESS for fact in record.wait_facts):
        return None
    return overlap(_apart(record), record.start_ns, record.duration_ns, record.stages)


def _apart(record: RequestRecord) -> Iterator[Stall]:
    """Yield the waits one by one; where two causes overlap, the first of CAUSES has the time."""
    charged = Charged()
    for cause in CAUSES:
        found = [_wait(fact) for fact in record.wait_facts if _cause(fact) == cause]
        if cause in _OF_PROCESS:
            held = held_up(cause, record.wait_facts)
            found = [
                (max(start, first), min(end, last))
                for (start, end), (first, last) in product(found, held)
                if max(start, first) < min(end, last)
            ]
        for start, end in sorted(found):
            for first, last in charged.take(start, end):
                yield Stall(cause, record.start_ns + first, record.start_ns + last)


def _cause(fact: WaitFact) -> str:
    if fact.kind in ("ready", "due"):
        return "event_loop"
    return "cpu" if fact.kind == "queued" else fact.kind


def _wait(fact: WaitFact) -> tuple[int, int]:
    # Of a timer that nobody held up it is no wait that it came late.
    late = fact.start_ns + TIMER_SLACK_NS if fact.kind == "due" else fact.start_ns
    return min(late, fact.end_ns), fact.end_ns
