"""Which stage a thread was in at a moment, from a capture's ledger."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stagescope.agent.torch_trace import Opening
from stagescope.stages import stage_of


class Found(NamedTuple):
    """The stage of a moment; empty where none is known."""

    stage: str
    how: str
    """`thread`; `ambiguous`: several requests had different stages open on that thread, the one
    opened last is given; `time`: by the one inference under way; `none`."""


NONE = Found("", "none")


class StageAt:
    """Answers for every thread; each lookup is a bisection."""

    def __init__(self, openings: Sequence[Opening], aliases: Mapping[int, int]) -> None:
        by_thread: dict[int, list[Opening]] = defaultdict(list)
        for opening in openings:
            by_thread[opening.thread_id].append(opening)
        self._threads = {thread: _stretches(own) for thread, own in by_thread.items()}
        self._aliases = aliases
        models = [one for one in openings if stage_of(one.stage) == "inference"]
        self._models = _stretches(models, of_any=True)

    def __call__(self, thread_id: int, at_ns: int) -> Found:
        """Give the stage of the thread that a trace calls *thread_id*, at *at_ns*.

        A thread that never opened a stage works for others: for the inference under way, where
        that is but one.
        """
        known = self._threads.get(self._aliases.get(thread_id, thread_id))
        if known is not None:
            return _at(known, at_ns)
        found = _at(self._models, at_ns)
        return Found(found.stage, "time") if found.how == "thread" else NONE


_Stretches = tuple[list[int], list[Found]]
"""Starts, and what holds from each start to the next."""


def _stretches(openings: Sequence[Opening], *, of_any: bool = False) -> _Stretches:
    real = [one for one in openings if one.start_ns < one.end_ns]
    edges = sorted(
        [(one.start_ns, 1, one) for one in real] + [(one.end_ns, 0, one) for one in real],
        key=lambda edge: edge[:2],
    )
    active: list[Opening] = []
    starts: list[int] = []
    founds: list[Found] = []
    for at_ns, opens, opening in edges:
        if opens:
            active.append(opening)
        elif opening in active:
            active.remove(opening)
        found = _now(active, of_any=of_any)
        if not founds or founds[-1] != found:
            starts.append(at_ns)
            founds.append(found)
    return starts, founds


def _now(active: Sequence[Opening], *, of_any: bool) -> Found:
    if not active:
        return NONE
    last = max(active, key=lambda one: one.start_ns)
    if of_any:
        alike = len({one.stage for one in active}) == 1
    else:
        # The stage that each request has innermost; where they differ, time cannot tell whose
        # code runs. A batch and its members are one.
        innermost: dict[str, str] = {}
        for one in active:
            if one.kind == "request":
                innermost[one.span_id] = one.stage
        alike = len(set(innermost.values())) < 2
    return Found(last.stage, "thread" if alike else "ambiguous")


def _at(stretches: _Stretches, at_ns: int) -> Found:
    starts, founds = stretches
    index = bisect_right(starts, at_ns) - 1
    return founds[index] if index >= 0 else NONE
