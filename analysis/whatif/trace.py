"""From a run folder to the pipeline that is simulated."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.waits.build import served_requests
from stagescope.analysis.waits.requests import NETWORK, Served, Waits, most_at_once
from stagescope.analysis.waits.split import split
from stagescope.analysis.whatif.batches import Batch, batchers, explicit, implicit
from stagescope.analysis.whatif.model import (
    BATCH,
    DELAY,
    LOOP,
    POOL,
    Pipeline,
    Pool,
    Request,
    Work,
)
from stagescope.analysis.whatif.pieces import (
    GAP,
    POOL_WAIT,
    RAN,
    SCATTER_NS,
    THREAD,
    Piece,
    own_shares,
    pieces,
)
from stagescope.errors import UsageError
from stagescope.stages import stage_of

MOST_REQUESTS = 20_000
"""The first so many of a run are simulated."""
LEAST_REQUESTS = 50
MOST_LOST = 0.05
"""Requests that failed, or have no server record, as a share: beyond it there is no simulation."""
WAITED_NS = 1_000_000
LEAST_SEEN = 5
LOOP_COST_MS = 0.2
"""What a server's own code takes of the loop for a request, where that was not seen."""
MOST_LOOP_COST_MS = 2.0
MOST_WAKING_MS = 0.5


@dataclass(frozen=True, slots=True)
class _Seen:
    """One request, both sides."""

    client: Mapping[str, Any]
    served: Served
    pieces: Sequence[Piece]
    shares: Mapping[str, float]
    batches: Sequence[Batch]


def read_pipeline(tables: RunTables) -> Pipeline:
    """Return the pipeline of a run; raise UsageError where it cannot be simulated."""
    seen, lost = _seen(tables)
    notes: list[str] = []
    if lost:
        notes.append(f"{lost:,} requests failed or have no server record and are left out")
    names = sorted({one.served.process for one in seen})
    process = {name: index for index, name in enumerate(names)}
    pool_of = _pools_of_stages(seen)
    pools = {name: _pool(name, pool_of, seen) for name in dict.fromkeys(pool_of.values())}
    waking_ms = _waking_ms(seen)
    loop_cost_ms = _loop_cost_ms(seen)
    origin = min(one.client["intended_ns"] for one in seen)
    measured = [one for one in seen if one.client["phase"] != "warmup"]
    begin_ms = (min(one.client["intended_ns"] for one in measured) - origin) / 1e6
    last_ms = (max(one.client["intended_ns"] for one in measured) - origin) / 1e6
    made = _Maker(pool_of, waking_ms, loop_cost_ms, origin, process)
    return Pipeline(
        requests=tuple(made.request(one) for one in seen),
        processes=len(names),
        pools=pools,
        batchers=batchers({id(b): b for one in seen for b in one.batches}.values(), origin),
        begin_ms=begin_ms,
        measured_ms=max(tables.run.measured_s * 1e3, last_ms - begin_ms),
        notes=tuple(notes),
    )


def _seen(tables: RunTables) -> tuple[list[_Seen], int]:
    c, s = tables.client, tables.server
    clients = rows(c.order_by("seq").limit(MOST_REQUESTS))
    wanted = s.select("trace_id", "parent_span_id", "span_id", "start_ns", "boot_id", "profiled")
    records = {(row["trace_id"], row["parent_span_id"]): row for row in rows(wanted)}
    answered = {row["seq"] for row in clients if not row["error"] and row["status"]}
    met = [
        (row, records[key])
        for row in clients
        if row["seq"] in answered
        and (key := (row["trace_id"], row["span_id"])) in records
        and not records[key]["profiled"]
    ]
    boot = tables.run.host.boot_id
    sent = {r["span_id"]: c["sent_ns"] for c, r in met if boot and r["boot_id"] == boot}
    served = {one.key: one for one in served_requests(tables, sent)}
    if clients and not any(one.facts for one in served.values()):
        raise UsageError(
            f"{tables.folder} cannot be simulated: it does not say when its requests ran and "
            "waited; run `stagescope load` against a server whose agent answers (docs/whatif.md)"
        )
    if not met or any(r["span_id"] not in sent for _, r in met):
        raise UsageError(
            f"{tables.folder} cannot be simulated: client and server need the same clock; "
            "run `stagescope load` on the server's host"
        )
    measured = [c for c, _ in met if c["phase"] != "warmup"]
    if len(measured) < LEAST_REQUESTS:
        raise UsageError(
            f"{tables.folder} cannot be simulated: {len(measured):,} measured requests were "
            f"answered and recorded, {LEAST_REQUESTS} are needed; run for longer, or faster"
        )
    lost = len(clients) - len(met)
    if lost > MOST_LOST * len(clients):
        raise UsageError(
            f"{tables.folder} cannot be simulated: {lost:,} of {len(clients):,} requests failed "
            "or have no server record"
        )
    return _both(tables, met, served), lost


def _both(
    tables: RunTables, met: Iterable[tuple[Any, Any]], served: Mapping[str, Served]
) -> list[_Seen]:
    waits = split(list(served.values()))
    cut = {key: pieces(one) for key, one in served.items()}
    found = explicit(tables, served)
    if not found:
        found = implicit(served, cut)
    return [
        _Seen(
            client,
            served[record["span_id"]],
            cut[record["span_id"]],
            own_shares(cut[record["span_id"]], waits.get(record["span_id"], Waits())),
            found.get(record["span_id"], ()),
        )
        for client, record in met
    ]


def _pools_of_stages(seen: Sequence[_Seen]) -> dict[str, str]:
    """Return the pool of each stage that threads work in: stages of one stretch share a pool."""
    together: dict[str, set[str]] = {}
    for one in seen:
        facts: dict[int, set[str]] = defaultdict(set)
        for piece in one.pieces:
            if piece.kind == THREAD and not _around(piece.stage):
                facts[piece.fact].add(stage_of(piece.stage))
        for stages in facts.values():
            whole = set().union(stages, *(together.get(stage, ()) for stage in stages))
            for stage in whole:
                together[stage] = whole
    return {stage: "+".join(sorted(whole)) for stage, whole in together.items()}


def _around(stage: str) -> bool:
    """Return whether *stage* stands around a thread's work, rather than for it."""
    return stage_of(stage) in ("queue", "endpoint", "other", "respond")


def _pool_name(work: Sequence[Piece], pool_of: Mapping[str, str]) -> str:
    names = Counter[str]()
    for piece in work:
        names[pool_of.get(stage_of(piece.stage), "")] += piece.length
    return max((name for name in names if name), key=lambda name: names[name], default="threads")


def _thread_works(one: _Seen) -> list[list[Piece]]:
    found: dict[int, list[Piece]] = defaultdict(list)
    for piece in one.pieces:
        if piece.kind == THREAD:
            found[piece.fact].append(piece)
    return list(found.values())


def _pool(name: str, pool_of: Mapping[str, str], seen: Sequence[_Seen]) -> Pool:
    times: dict[str, list[tuple[int, int]]] = defaultdict(list)
    waited = 0
    for one in seen:
        for work in _thread_works(one):
            if _pool_name(work, pool_of) == name:
                times[one.served.process].append((work[0].start, work[-1].end))
        waited += any(p.stage == POOL_WAIT and p.length > 2 * WAITED_NS for p in one.pieces)
    most = max((most_at_once(all_, SCATTER_NS) for all_ in times.values()), default=1)
    known = waited >= max(3, len(seen) // 100)
    stages = frozenset(stage for stage, pool in pool_of.items() if pool == name)
    return Pool(stages, most if known else None, most)


def _waking_ms(seen: Sequence[_Seen]) -> float:
    """Return what the way into a thread takes where one is free."""
    waits = [p.length for one in seen for p in one.pieces if p.stage == POOL_WAIT and p.kind == GAP]
    works = sum(len(_thread_works(one)) for one in seen)
    waits += [0] * (works - len(waits))
    if len(waits) < LEAST_SEEN:
        return 0.0
    return min(quantiles(waits, n=10)[0] / 1e6, MOST_WAKING_MS)


def _loop_cost_ms(seen: Sequence[_Seen]) -> float:
    """Return what a request takes of the loop beyond its steps: the server's own code.

    It is seen where a request waited already when another one's step ended.
    """
    steps: dict[tuple[str, int], list[tuple[int, int, int]]] = defaultdict(list)
    for one in seen:
        sent = one.served.sent_ns
        for fact in sorted(one.served.facts, key=lambda fact: fact.start_ns):
            if fact.kind == RAN:
                start, end = (one.served.start_ns + at for at in (fact.start_ns, fact.end_ns))
                steps[one.served.process, fact.loop].append((start, end, sent))
                sent = end  # Only before its first step is it known that it waited.
    gaps = []
    for all_ in steps.values():
        all_.sort()
        for (_, before, _), (start, _, sent) in pairwise(all_):
            if sent + WAITED_NS < before <= start:
                gaps.append((start - before) / 1e6)
    if len(gaps) >= LEAST_SEEN:
        return min(median(gaps), MOST_LOOP_COST_MS)
    return LOOP_COST_MS


class _Maker:
    """Makes the works of one request after the other."""

    def __init__(
        self,
        pool_of: Mapping[str, str],
        waking_ms: float,
        loop_cost_ms: float,
        origin_ns: int,
        process: Mapping[str, int],
    ) -> None:
        self._pool_of = pool_of
        self._waking_ms = waking_ms
        self._loop_cost_ms = loop_cost_ms
        self._origin_ns = origin_ns
        self._process = process

    def request(self, one: _Seen) -> Request:
        """Return *one* as it is simulated."""
        client, served = one.client, one.served
        before_ms = max(0, served.sent_ns - client["intended_ns"]) / 1e6
        end_ns = served.start_ns + served.duration_ns
        works = [Work(DELAY, (("client_wait", before_ms),)), *self._works(one)]
        return Request(
            at_ms=(client["intended_ns"] - self._origin_ns) / 1e6,
            measured=client["phase"] != "warmup",
            latency_ms=(client["last_byte_ns"] - client["intended_ns"]) / 1e6,
            process=self._process[served.process],
            works=tuple(works),
            after_ms=(client["last_byte_ns"] - end_ns) / 1e6,
        )

    def _works(self, one: _Seen) -> Iterable[Work]:
        batches = sorted(one.batches, key=lambda batch: batch.joined[one.served.key])
        yield from self._before(one)
        group: list[Piece] = []
        for piece in one.pieces:
            if piece.stage == NETWORK:
                continue
            while batches and piece.end > batches[0].joined[one.served.key]:
                yield from self._of_group(group, one)
                group = []
                yield Work(BATCH, where=batches[0].name)
                batches = batches[1:]
            if one.batches and any(
                b.joined[one.served.key] <= piece.start and piece.end <= b.end for b in one.batches
            ):
                continue
            if group and (piece.kind, piece.fact) != (group[-1].kind, group[-1].fact):
                yield from self._of_group(group, one)
                group = []
            group.append(piece)
        yield from self._of_group(group, one)

    def _before(self, one: _Seen) -> Iterable[Work]:
        gap = sum(p.length for p in one.pieces if p.stage == NETWORK) / 1e6
        own = gap * one.shares.get(NETWORK, 1.0)
        cost = min(own, self._loop_cost_ms)
        if own > cost:
            yield Work(DELAY, ((NETWORK, own - cost),))
        if cost:
            yield Work(LOOP, ((NETWORK, cost),))

    def _of_group(self, group: Sequence[Piece], one: _Seen) -> Iterable[Work]:
        if not group:
            return
        if group[0].kind == GAP:
            times = [(piece.stage, self._gap_ms(piece, one)) for piece in group]
            if times := [time for time in times if time[1] > 0]:
                yield Work(DELAY, tuple(times))
            return
        times = [(piece.stage, piece.length / 1e6) for piece in group]
        if group[0].kind == RAN:
            yield Work(LOOP, tuple(times))
        else:
            yield Work(POOL, tuple(times), _pool_name(group, self._pool_of))

    def _gap_ms(self, piece: Piece, one: _Seen) -> float:
        length = piece.length / 1e6
        if piece.stage == POOL_WAIT:
            return min(length, self._waking_ms)
        return length * one.shares.get(piece.stage, 1.0)
