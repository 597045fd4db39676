"""The run's batches: those that a batcher recorded, and those of a model thread of the app's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.waits.requests import Served, most_at_once
from stagescope.analysis.whatif.model import Batcher, Formed, Times
from stagescope.analysis.whatif.pieces import ENQUEUED, GAP, SCATTER_NS, WORKER_WAITS, Piece
from stagescope.stages import stage_of

EARLY = 0.7
"""A batch was closed for being full where it waited for less than so much of the usual delay."""
SHORT_NS = 100_000


@dataclass(slots=True)
class Batch:
    """One measured batch; absolute ns."""

    name: str
    process: str
    start: int
    end: int
    waited: int
    times: Times
    joined: dict[str, int] = field(default_factory=dict[str, int])
    """By a member's key, when it was enqueued."""
    members: int = 0
    """Those of other runs too."""


def explicit(tables: RunTables, served: Mapping[str, Served]) -> dict[str, list[Batch]]:
    """Return by request the batches that it was a member of, from the batches' own records."""
    found: dict[str, list[Batch]] = defaultdict(list)
    names = ("ring_id", "model", "start_ns", "duration_ns", "size", "members", "stages", "error")
    for row in rows(tables.batches.select(*names)):
        stages = [(s["stage"], s["self_ns"]) for s in row["stages"] or ()]
        waited = sum(ns for name, ns in stages if _is_wait(name))
        times = [(name, ns / 1e6) for name, ns in stages if not _is_wait(name)]
        rest = row["duration_ns"] - sum(ns for _, ns in stages)
        one = Batch(
            row["model"] or "batch", row["ring_id"] or "", row["start_ns"],
            row["start_ns"] + row["duration_ns"], waited,
            (*times, ("batch", max(0, rest) / 1e6)), members=row["size"],
        )  # fmt: skip
        for member in row["members"] or ():
            request = served.get(member["span_id"])
            if request is not None and not row["error"]:
                one.joined[request.key] = _enqueued(request, one)
                found[request.key].append(one)
    return found


def _is_wait(name: str) -> bool:
    return name in ("batch", "batch.wait", "queue.batch")


def _enqueued(request: Served, batch: Batch) -> int:
    """Return when *request* began to wait for *batch*."""
    starts = [
        request.start_ns + start
        for name, start, _ in request.stages
        if name in ENQUEUED and request.start_ns + start < batch.end
    ]
    return min(starts, default=max(batch.start, request.start_ns))


def implicit(
    served: Mapping[str, Served], cut: Mapping[str, Sequence[Piece]]
) -> dict[str, list[Batch]]:
    """Return by request the rounds of model threads that it was in: see docs/waits.md."""
    stages = {
        after.stage
        for all_ in cut.values()
        for before, after in pairwise(all_)
        if before.stage in WORKER_WAITS and after.kind == before.kind == GAP
        and stage_of(after.stage) not in ("queue", "batch")
    }  # fmt: skip
    rounds: dict[tuple[str, int], Batch] = {}
    found: dict[str, list[Batch]] = defaultdict(list)
    for key, all_ in cut.items():
        for run in _worker_runs(all_, stages):
            work = [piece for piece in run if piece.stage not in WORKER_WAITS]
            if not work:
                continue
            process = served[key].process
            times = tuple((piece.stage, piece.length / 1e6) for piece in work)
            waited = sum(p.length for p in run if p.stage == "batch.wait")
            fresh = Batch("worker", process, work[0].start - waited, work[-1].end, waited, times)
            one = rounds.setdefault((process, work[-1].end // SHORT_NS), fresh)
            one.joined[key] = run[0].start
            one.members += 1
            found[key].append(one)
    return found


def _worker_runs(all_: Sequence[Piece], stages: set[str]) -> Iterable[list[Piece]]:
    """Yield each stretch in which a request waited for a worker's answer."""
    run: list[Piece] = []
    for piece in all_:
        if piece.kind == GAP and (piece.stage in stages or piece.stage in WORKER_WAITS):
            run.append(piece)
        elif run:
            yield run
            run = []
    if run:
        yield run


def batchers(batches: Iterable[Batch], origin_ns: int) -> dict[str, Batcher]:
    """Return what is known of each batcher, by its name."""
    by_name: dict[str, list[Batch]] = defaultdict(list)
    for one in batches:
        by_name[one.name].append(one)
    return {name: _batcher(all_, origin_ns) for name, all_ in by_name.items()}


def _batcher(batches: Sequence[Batch], origin_ns: int) -> Batcher:
    largest = max(one.members for one in batches)
    smaller = [one.waited for one in batches if one.members < largest or largest == 1]
    delay_ns = median(smaller) if smaller else 0
    full = [one for one in batches if one.members == largest]
    early = [one for one in full if one.waited < EARLY * delay_ns]
    # Where batches do not wait, a size that was met again and again while others waited is the cap.
    known = largest > 1 and len(early) >= 3 and len(early) >= len(full) // 2
    by_process: dict[str, list[Batch]] = defaultdict(list)
    for one in batches:
        by_process[one.process].append(one)
    return Batcher(
        workers=max(
            most_at_once(((one.start, one.end) for one in all_), SCATTER_NS)
            for all_ in by_process.values()
        ),
        delay_ms=delay_ns / 1e6,
        max_size=largest if known or (largest == 1 and _never_joined(batches)) else None,
        largest=largest,
        turnaround_ms=_turnaround_ms(by_process.values()),
        batches=tuple(
            Formed((one.start - origin_ns) / 1e6, one.members, one.times)
            for one in sorted(batches, key=lambda one: one.start)
        ),
    )


def _never_joined(batches: Sequence[Batch]) -> bool:
    """Return whether requests waited for a batch and were not taken into one together."""
    waited = sum(min(one.joined.values()) < one.start - SHORT_NS for one in batches if one.joined)
    return waited >= 3


def _turnaround_ms(processes: Iterable[Sequence[Batch]]) -> float:
    gaps = []
    for all_ in processes:
        ordered = sorted(all_, key=lambda one: one.start)
        for before, after in pairwise(ordered):
            first = min(after.joined.values(), default=after.start)
            if first < before.end <= after.start:
                gaps.append((after.start - before.end) / 1e6)
    return median(gaps) if gaps else 0.0
