"""CPU time of the run's processes, by stage: from `samples` and `stacks` of the run folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import cast

import ibis.expr.types as ir

from stagescope.analysis.cpu_share import Running, shared_out
from stagescope.analysis.resource_report import Cpu, CpuTotal
from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.window import Window, amounts, samples_in, with_timeline
from stagescope.stages import OTHER, stage_of

CPU_TIME = "process.cpu.time"
WORKS_FOR = "stagescope.process.works_for"
"""Says of a process whose child it is."""
_SURE = ("marker", "block")
"""How the stage of a stack is known for certain."""


@dataclass(frozen=True, slots=True)
class CpuByStage:
    """CPU time by full name of the stage, by outer stage, and in total."""

    full: dict[str, Cpu]
    outer: dict[str, Cpu]
    total: CpuTotal


def steady_stacks(stacks: ir.Table, window: Window) -> ir.Table:
    """Give the stacks of *window* that were sampled at a steady rate, not for what happened."""
    middle = (stacks.start_ns + stacks.end_ns) // 2
    steady = stacks.reason.fill_null("window") == "window"
    inside = (middle >= window.begin_ns) & (middle < window.end_ns)
    return cast(ir.Table, stacks.filter(steady & inside & stacks.pid.notnull()))


def served_pids(tables: RunTables, window: Window, stacks: ir.Table) -> frozenset[int]:
    """Give the processes that served the run: of the requests, and of workers.

    A worker is no request's own process. It is known as the child of one, or by a stack that was
    surely in a stage.
    """
    known = with_timeline(tables.server)
    inside = known.filter(known.start_ns + known.duration_ns >= window.begin_ns)
    sure = stacks.filter(stacks.by.isin(_SURE) & (stacks.stage.fill_null("") != ""))
    found = (*rows(inside.select("pid").distinct()), *rows(sure.select("pid").distinct()))
    pids = {int(row["pid"]) for row in found if row["pid"]}
    for row in rows(
        samples_in(tables.samples, window, WORKS_FOR).select("pid", "detail").distinct()
    ):
        if row["detail"] in {str(pid) for pid in pids}:
            pids.add(int(row["pid"]))
    return frozenset(pids)


def cpu_by_stage(
    tables: RunTables,
    window: Window,
    stacks: ir.Table,
    pids: Collection[int],
    stages: Iterable[str],
) -> CpuByStage | None:
    """Give the CPU time of *pids*; None where it was not sampled.

    *stacks* are `steady_stacks`. *stages* are shown with 0 where no running sample was in them.
    """
    every = amounts(tables.samples, window, CPU_TIME, "pid")
    spent = {int(pid): amount for (pid,), amount in every.items() if int(pid) in pids}
    if not spent:
        return None
    ran = stacks.filter(stacks.running.fill_null(False) & stacks.pid.isin(sorted(spent)))
    running, total = _running(ran), sum(spent.values())
    names = [*stages, OTHER]
    full, unsampled = shared_out(spent, running, names, str)
    outer, _ = shared_out(spent, running, names, stage_of)
    return CpuByStage(
        full=full,
        outer=outer,
        total=CpuTotal(
            cpu_s=total,
            processes=len(spent),
            samples=sum(each.samples for each in running),
            unsampled_s=unsampled,
            known_by=_counts(ran, "by"),
            sampled_by=tuple(_counts(ran, "how")),
        ),
    )


def _running(ran: ir.Table) -> list[Running]:
    name = ran.stage.fill_null("").nullif("").fill_null(OTHER)
    each = ran.select("pid", "samples", stage=name, weight_ns=ran.end_ns - ran.start_ns)
    sums = each.group_by(["pid", "stage"]).aggregate(
        weight_ns=each.weight_ns.sum(), count=each.samples.fill_null(0).sum()
    )
    return [
        Running(int(row["pid"]), row["stage"], int(row["weight_ns"]), int(row["count"]))
        for row in rows(sums.order_by("pid", "stage"))
    ]


def _counts(ran: ir.Table, column: str) -> dict[str, int]:
    """Give the running samples by the words of *column*, the most frequent first."""
    word = ran[column].fill_null("none")
    each = ran.select(word=word, samples=ran.samples.fill_null(0))
    sums = each.group_by("word").aggregate(count=each.samples.sum())
    found = {row["word"]: int(row["count"]) for row in rows(sums)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
