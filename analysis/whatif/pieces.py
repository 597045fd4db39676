"""A request's time in pieces: which stage was charged, and what it had or waited for meanwhile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagescope.analysis.waits.requests import Served, Waits, cut, segments

GAP, RAN, THREAD = "gap", "ran", "thread"
POOL_WAIT = "queue.threadpool"
WORKER_WAITS = ("queue.worker", "batch.wait")
SCATTER_NS = 50_000
ENQUEUED = ("queue.batch", "batch", "batch.wait", "batch.collate")


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of one request's time, absolute ns."""

    start: int
    end: int
    stage: str
    kind: str
    """`ran` on the event loop, in a `thread`, or in a `gap`: neither of them."""
    fact: int
    """Pieces of one stretch of running have the same number; -1: none."""

    @property
    def length(self) -> int:
        """How long it lasted, ns."""
        return self.end - self.start


def pieces(request: Served) -> list[Piece]:
    """Return the pieces of *request*, from *sent* until its end."""
    parts, found = segments(request), []
    at = parts[0][0] if parts else request.start_ns
    last = request.start_ns + request.duration_ns
    for start, end, kind, fact in _running(request):
        start, end = max(start, at), min(end, last)
        if end <= start:
            continue
        found += [Piece(*part, GAP, -1) for part in cut(parts, at, start)]
        found += [Piece(*part, kind, fact) for part in cut(parts, start, end)]
        at = end
    return [*found, *(Piece(*part, GAP, -1) for part in cut(parts, at, last))]


def _running(request: Served) -> list[tuple[int, int, str, int]]:
    """Return when it ran, one after the other: a step that lasts beyond its thread's begin is cut.

    The step was over but for its way back to the loop, or had no core.
    """
    times = [
        (request.start_ns + fact.start_ns, request.start_ns + fact.end_ns, fact.kind, index)
        for index, fact in enumerate(request.facts)
        if fact.kind in (RAN, THREAD) and fact.end_ns > fact.start_ns
    ]
    threads = sorted(one for one in times if one[2] == THREAD)
    found = list(threads)
    for start, end, kind, index in (one for one in times if one[2] == RAN):
        for first, last, _, _ in threads:
            if first < end and last > start:
                if start < first:
                    found.append((start, first, kind, index))
                start = max(start, last)
        if start < end:
            found.append((start, end, kind, index))
    return sorted(found)


def own_shares(request: Sequence[Piece], waits: Waits | None) -> Mapping[str, float]:
    """Return of each stage how much of its gaps is left without its waits for the event loop."""
    gaps: dict[str, int] = defaultdict(int)
    for piece in request:
        if piece.kind == GAP:
            gaps[piece.stage] += piece.length
    waited = {} if waits is None else waits.charges
    return {
        stage: max(0.0, 1 - waited[stage, "event_loop"].ns / length)
        if (stage, "event_loop") in waited
        else 1.0
        for stage, length in gaps.items()
        if length
    }
