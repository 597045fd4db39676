"""The waits of a run: read from its folder, separated by cause, and put beside the table's parts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ibis
import ibis.expr.types as ir
import pyarrow as pa

from stagescope.analysis.breakdown import Slot
from stagescope.analysis.report import Held, Holder, Own, Part, Wait
from stagescope.analysis.resources.model import Resources
from stagescope.analysis.sources import RunTables, rows, stored, uploaded
from stagescope.analysis.statistics import figures
from stagescope.analysis.waits.requests import Served, Waits
from stagescope.analysis.waits.split import CAUSES, split
from stagescope.stages import WaitFact, stage_of

NAMED = {
    "threadpool": ("queue.threadpool", "queue.worker"),
    "batch": ("queue.batch", "batch", "batch.wait"),
}
"""Waits that are stages of their own: they are charged where they always were."""


@dataclass(frozen=True, slots=True)
class RunWaits:
    """What is added to a report."""

    parts: tuple[Part, ...]
    waits: tuple[Wait, ...] = ()
    held: tuple[Held, ...] = ()
    served: Sequence[Served] = ()
    """All requests with a place on a clock, and below what each waited, by its key."""
    found: Mapping[str, Waits] = field(default_factory=dict[str, Waits])


def with_waits(
    tables: RunTables,
    base: ir.Table,
    order: Sequence[Slot],
    parts: tuple[Part, ...],
    total: Part,
    requests: int,
    resources: Resources | None,
) -> RunWaits:
    """Return *parts* with what each took itself, and the waits of the *base* of the breakdown."""
    s = tables.server
    (known,) = rows(s.aggregate(n=(s.wait_facts.length().fill_null(0) > 0).sum()))
    if not known["n"]:
        return RunWaits(parts)
    sent = {
        row["server_span_id"]: row["sent_ns"]
        for row in rows(base.filter(base.one_clock).select("server_span_id", "sent_ns"))
    }
    served = list(served_requests(tables, sent))
    found = split(served)
    by_column = _columns(order)
    causes = [cause for cause in CAUSES if any(_has(each, cause) for each in found.values())]
    if not causes:
        return RunWaits(parts, served=served, found=found)
    table = _stored(tables, base, found, by_column, causes)
    numbers = _Numbers(tables, table, by_column, causes, requests)
    kept = {row["server_span_id"] for row in rows(base.select("server_span_id"))}
    held = _held([each for key, each in found.items() if key in kept], requests, resources)
    waits = [numbers.wait(cause, total, held if cause == "event_loop" else ()) for cause in causes]
    named = (_named(parts, name, stages) for name, stages in NAMED.items())
    return RunWaits(
        tuple(numbers.part(part, slot) for part, slot in zip(parts, order, strict=True)),
        (*waits, *(wait for wait in named if wait is not None)),
        tuple(held),
        served,
        found,
    )


def served_requests(tables: RunTables, sent: Mapping[str, int]) -> Iterable[Served]:
    s = tables.server
    wanted = s.select("span_id", "ring_id", "start_ns", "duration_ns", "stages", "wait_facts")
    for row in rows(wanted):
        if not row["start_ns"]:
            continue  # From a header: it has no place on a clock.
        start_ns = row["start_ns"]
        yield Served(
            key=row["span_id"],
            process=row["ring_id"] or "",
            start_ns=start_ns,
            duration_ns=row["duration_ns"],
            sent_ns=min(sent.get(row["span_id"], start_ns), start_ns),
            stages=[(s["stage"], s["start_ns"], s["end_ns"]) for s in row["stages"] or ()],
            facts=[
                WaitFact(f["kind"], f["loop"], f["start_ns"], f["end_ns"])
                for f in row["wait_facts"] or ()
            ],
        )


def _has(waits: Waits, cause: str) -> bool:
    return any(of == cause for _, of in waits.charges)


def _columns(order: Sequence[Slot]) -> dict[str, tuple[str, bool]]:
    """Return by column which stage name it shows, and whether its sub-stages are in it."""
    found: dict[str, tuple[str, bool]] = {}
    for slot in order:
        found[slot.column] = (slot.name, True)
        for inner in slot.inner:
            found.setdefault(inner.column, (inner.name, False))
    return {
        column: name
        for column, name in found.items()
        if column not in ("client_wait", "connect", "unexplained", "network_response")
    }


def _stored(
    tables: RunTables,
    base: ir.Table,
    found: Mapping[str, Waits],
    by_column: Mapping[str, tuple[str, bool]],
    causes: Sequence[str],
) -> ir.Table:
    """Return *base* with each column's waits by cause, and what is left of it: `own_<column>`."""
    extra = uploaded(tables, _amounts(found, by_column, causes))
    joined = base.left_join(extra, base.server_span_id == extra.wait_span_id)
    cut: dict[str, ir.Value] = {}
    for column in by_column:
        for kind in ("w", "l", "h"):
            left = joined[column]
            for cause in causes:
                name = f"{kind}_{column}_{cause}"
                cut[name] = ibis.least(joined[name].fill_null(0), left)
                left = left - cut[name]
            cut[f"own_{kind}_{column}"] = left
    outer = [column for column, (_, whole) in by_column.items() if whole]
    clean = joined.select("seq", "latency_ns", **cut)
    sums = {
        f"{kind}_{cause}": sum(
            (clean[f"{kind}_{column}_{cause}"] for column in outer), ibis.literal(0)
        )
        for kind in ("w", "l", "h")
        for cause in causes
    }
    return stored(tables, clean.mutate(**sums))


def _amounts(
    found: Mapping[str, Waits],
    by_column: Mapping[str, tuple[str, bool]],
    causes: Sequence[str],
) -> pa.Table:
    """Return a row a request: of each column and cause the wait, and its least and most."""
    data: dict[str, list[Any]] = defaultdict(list)
    for key, waits in found.items():
        data["wait_span_id"].append(key)
        for column, (name, whole) in by_column.items():
            for cause in causes:
                amounts = [0, 0, 0]
                for (stage, of), charge in waits.charges.items():
                    if of == cause and (stage_of(stage) if whole else stage) == name:
                        amounts[0] += charge.ns
                        amounts[1] += charge.low_ns
                        amounts[2] += charge.high_ns
                for kind, amount in zip(("w", "l", "h"), amounts, strict=True):
                    data[f"{kind}_{column}_{cause}"].append(amount)
    return pa.table({name: pa.array(values) for name, values in data.items()})


class _Numbers:
    """Figures of the columns that `_stored` made, in ms."""

    def __init__(
        self,
        tables: RunTables,
        table: ir.Table,
        by_column: Mapping[str, tuple[str, bool]],
        causes: Sequence[str],
        requests: int,
    ) -> None:
        self._causes = causes
        timed = [
            "latency_ns",
            *(f"own_w_{column}" for column in by_column),
            *(f"w_{cause}" for cause in causes),
        ]
        self._figures = figures(tables, table, timed, requests)
        bounds = [name for name in table.columns if name not in ("seq", *timed)]
        (row,) = rows(table.aggregate(**{name: table[name].mean() for name in bounds}))
        self._means = {name: float(value or 0.0) / 1e6 for name, value in row.items()}
        self._known = set(by_column)

    def part(self, part: Part, slot: Slot) -> Part:
        """Return *part* with its own time, and those inside it with theirs."""
        if slot.column not in self._known:
            return part
        inner = tuple(
            self.part(each, within) for each, within in zip(part.inner, slot.inner, strict=True)
        )
        found = self._figures[f"own_w_{slot.column}"]
        slowest = self._figures["latency_ns"].slowest_ms
        return replace(
            part,
            inner=inner,
            own=Own(
                found.mean_ms,
                found.p50_ms,
                found.p95_ms,
                found.p99_ms,
                low_ms=self._means[f"own_h_{slot.column}"],
                high_ms=self._means[f"own_l_{slot.column}"],
                share_slowest=found.slowest_ms / slowest if slowest else 0.0,
                waits={
                    cause: self._means[f"w_{slot.column}_{cause}"]
                    for cause in self._causes
                    if self._means[f"w_{slot.column}_{cause}"]
                },
            ),
        )

    def wait(self, cause: str, total: Part, held: Sequence[Held]) -> Wait:
        """Return the wait for *cause*, all parts together."""
        found, latency = self._figures[f"w_{cause}"], self._figures["latency_ns"]
        sums: dict[tuple[str, str], float] = defaultdict(float)
        for cell in held:
            sums[cell.stage, cell.where] += cell.mean_ms
        whole = sum(sums.values())
        return Wait(
            cause,
            found.mean_ms,
            found.p50_ms,
            found.p95_ms,
            found.p99_ms,
            share=found.mean_ms / total.mean_ms if total.mean_ms else 0.0,
            share_slowest=found.slowest_ms / latency.slowest_ms if latency.slowest_ms else 0.0,
            low_ms=self._means[f"l_{cause}"],
            high_ms=self._means[f"h_{cause}"],
            held_by=tuple(
                Holder(stage, where, ms / whole)
                for (stage, where), ms in sorted(sums.items(), key=lambda item: -item[1])
            ),
        )


def _named(parts: Sequence[Part], cause: str, stages: Sequence[str]) -> Wait | None:
    """Return the wait that is a stage by name; several as one have a mean and no percentiles."""
    found = [
        each
        for part in parts
        for each in (part, *part.inner)
        if each.name in stages and not (each is part and part.inner)
    ]
    found = [each for each in found if each.own is not None and each.recorded and each.mean_ms > 0]
    return _together(cause, found) if found else None


def _together(cause: str, found: Sequence[Part]) -> Wait:
    own = [part.own for part in found if part.own is not None]
    return Wait(
        cause,
        sum(each.mean_ms for each in own),
        sum(each.p50_ms for each in own),
        sum(each.p95_ms for each in own),
        sum(each.p99_ms for each in own),
        share=sum(part.share for part in found),
        share_slowest=sum(part.share_slowest for part in found),
        low_ms=sum(each.low_ms for each in own),
        high_ms=sum(each.high_ms for each in own),
        held_by=(),
    )


def _held(waits: Iterable[Waits], requests: int, resources: Resources | None) -> list[Held]:
    sums: dict[tuple[str, str], int] = defaultdict(int)
    for each in waits:
        for cell, spent in each.held.items():
            sums[cell] += spent
    lines = _top_lines(resources)
    return [
        Held(waited, stage, lines.get(stage, ""), spent / requests / 1e6)
        for (waited, stage), spent in sorted(sums.items(), key=lambda item: -item[1])
        if spent
    ]


def _top_lines(resources: Resources | None) -> dict[str, str]:
    found: dict[str, str] = {}
    for use in resources.stages if resources else ():
        for each in (use, *use.sub_stages):
            running = [stack.frame for stack in each.stacks if stack.running]
            found.setdefault(each.stage, running[0] if running else "")
    return found
