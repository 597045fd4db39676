"""CPU time of the run's processes, by stage: from `samples` and `stacks` of the run folder."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import ibis.expr.types as ir

from stagescope.analysis.resources.model import Cpu, CpuTotal
from stagescope.analysis.resources.window import Window, amounts, samples_in, with_timeline
from stagescope.analysis.sources import RunTables, rows
from stagescope.stages import OTHER, stage_of


@dataclass(frozen=True, slots=True)
class Running:
    """Running stack samples of one process in one stage."""

    pid: int
    stage: str
    weight_ns: int
    """CPU time that their threads used; where that was not read, what the samples stand for."""
    samples: int


def shared_out(
    cpu_s: Mapping[int, float],
    running: Iterable[Running],
    stages: Iterable[str],
    name_of: Callable[[str], str],
) -> tuple[dict[str, Cpu], float]:
    """Return CPU time by *name_of* the stage, and that of processes without a sample.

    *cpu_s* is by pid. Each process is shared out by its own samples, so that all together is the
    sum of *cpu_s*. *stages* are further stages, which may have no sample: their share is 0.
    """
    samples = list(running)
    names = {name_of(stage) for stage in (*stages, *(each.stage for each in samples))}
    seen: dict[int, dict[str, list[int]]] = {}
    for each in samples:
        cells = seen.setdefault(each.pid, {name: [0, 0] for name in names})
        cell = cells[name_of(each.stage)]
        cell[0] += each.weight_ns
        cell[1] += each.samples
    found: dict[str, Cpu] = {}
    unsampled = 0.0
    for pid, spent in cpu_s.items():
        cells = seen.get(pid, {})
        if not sum(weight for weight, _ in cells.values()):
            unsampled += spent
            continue
        for name, own in _of_process(spent, cells).items():
            found[name] = _added(found[name], own) if name in found else own
    return found, unsampled


def _of_process(cpu_s: float, cells: Mapping[str, list[int]]) -> dict[str, Cpu]:
    weight = sum(own for own, _ in cells.values())
    count = sum(samples for _, samples in cells.values())
    return {
        name: Cpu(cpu_s * own / weight, cpu_s * share_error(own / weight, count), samples)
        for name, (own, samples) in cells.items()
    }


def share_error(share: float, count: int) -> float:
    """Return the standard error of a *share* seen in *count* samples, taken to be independent.

    Half of Wilson's score interval at one standard deviation (E. B. Wilson, JASA 22, 1927):
    unlike `sqrt(p(1-p)/n)` it is not 0 for a stage that was seen never, or always.
    """
    if count <= 0:
        return 1.0
    return math.sqrt(share * (1 - share) / count + 1 / (4 * count**2)) / (1 + 1 / count)


def _added(one: Cpu, other: Cpu) -> Cpu:
    return Cpu(
        one.cpu_s + other.cpu_s,
        math.hypot(one.error_s, other.error_s),
        one.samples + other.samples,
    )


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
    """Return the stacks of *window* that were sampled at a steady rate, not for what happened."""
    middle = (stacks.start_ns + stacks.end_ns) // 2
    steady = stacks.reason.fill_null("window") == "window"
    inside = (middle >= window.begin_ns) & (middle < window.end_ns)
    return cast(ir.Table, stacks.filter(steady & inside & stacks.pid.notnull()))


def served_pids(tables: RunTables, window: Window, stacks: ir.Table) -> frozenset[int]:
    """Return the processes that served the run: of the requests, and of workers.

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
    """Return the CPU time of *pids*; None where it was not sampled.

    *stacks* are `steady_stacks`. *stages* are shown with 0 where no running sample was in them.
    """
    every = amounts(tables.samples, window, CPU_TIME, "pid")
    spent = {int(pid): amount for (pid,), amount in every.items() if int(pid) in pids}
    if not spent:
        return None
    used = stacks.running.fill_null(False) | (stacks.cpu_ns.fill_null(0) > 0)
    ran = stacks.filter(used & stacks.pid.isin(sorted(spent)))
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
    weight_ns = ran.cpu_ns.fill_null(ran.end_ns - ran.start_ns)
    each = ran.select("pid", "samples", stage=name, weight_ns=weight_ns)
    sums = each.group_by(["pid", "stage"]).aggregate(
        weight_ns=each.weight_ns.sum(), count=each.samples.fill_null(0).sum()
    )
    return [
        Running(int(row["pid"]), row["stage"], int(row["weight_ns"]), int(row["count"]))
        for row in rows(sums.order_by("pid", "stage"))
    ]


def _counts(ran: ir.Table, column: str) -> dict[str, int]:
    """Return the running samples by the words of *column*, the most frequent first."""
    word = ran[column].fill_null("none")
    each = ran.select(word=word, samples=ran.samples.fill_null(0))
    sums = each.group_by("word").aggregate(count=each.samples.sum())
    found = {row["word"]: int(row["count"]) for row in rows(sums)}
    return dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
