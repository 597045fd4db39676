"""What the host and its devices did in a run, for the verdict: from samples, none of it by stage."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ibis

from stagescope.analysis.report import Report
from stagescope.analysis.resources.window import Window, run_window, samples_in
from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.verdict.model import GpuFacts, HostFacts

IDLE = ("idle", "iowait")
CPU_TIME = "system.cpu.time"
THROTTLED = "stagescope.cgroup.cpu.throttled_time"
CPU_LIMIT = "stagescope.cgroup.cpu.limit"
LIMIT_HITS = "stagescope.cgroup.memory.limit_hits"
FAULTS = "process.paging.faults"
USED, WHOLE = "system.memory.usage", "system.memory.limit"


@dataclass(frozen=True, slots=True)
class _Series:
    """The samples of one name and detail, over a run."""

    amount: float
    least: float
    most: float
    covered_s: float


def host_facts(tables: RunTables, report: Report) -> HostFacts:
    """Return what the samples of the host say of the run's time."""
    run, resources = report.run, report.resources
    cores, driver = run.host.cores, run.driver.get("cpu_share")
    window = run_window(tables, None)
    if window is None or resources is None:
        return HostFacts(cores, None, None, driver, None, None, None, 0.0)
    found = _series(tables, window)
    seconds = window.seconds
    modes = {detail: one for (name, detail), one in found.items() if name == CPU_TIME}
    covered_s = max((one.covered_s for one in modes.values()), default=0.0)
    busy = sum(one.amount for mode, one in modes.items() if mode not in IDLE)
    memory, cpu = resources.memory, resources.cpu
    throttled, hits, faults = (_amount(found, name) for name in (THROTTLED, LIMIT_HITS, FAULTS))
    limits = [one.least for (name, _), one in found.items() if name == CPU_LIMIT]
    used, whole = (
        max((one.most for (of, _), one in found.items() if of == name), default=None)
        for name in (USED, WHOLE)
    )
    return HostFacts(
        cores=cores,
        busy_cores=busy / covered_s if covered_s else None,
        server_cores=cpu.cpu_s / resources.window_s if cpu else None,
        driver_cores=driver,
        agent_cores=sum(one.core_share for one in resources.collectors),
        cgroup_limit=min(limits, default=None),
        throttled_share=None if throttled is None else throttled / seconds,
        sampled_share=min(1.0, covered_s / seconds),
        rss_first_bytes=memory.rss_first_bytes if memory else None,
        rss_last_bytes=memory.rss_last_bytes if memory else None,
        leak_bytes_per_s=memory.slope_bytes_per_s if memory else None,
        major_faults_per_s=None if faults is None else faults / seconds,
        memory_limit_hits=hits,
        memory_used_share=used / whole if used and whole else None,
    )


def _amount(found: Mapping[tuple[str, str], _Series], name: str) -> float | None:
    sums = [
        one.amount
        for (of, detail), one in found.items()
        if of == name and not (of == FAULTS and detail != "major")
    ]
    return sum(sums) if sums else None


def _series(tables: RunTables, window: Window) -> dict[tuple[str, str], _Series]:
    names = (CPU_TIME, THROTTLED, CPU_LIMIT, LIMIT_HITS, FAULTS, USED, WHOLE)
    each = samples_in(tables.samples, window, *names)
    sums = each.group_by(["name", "detail"]).aggregate(
        amount=(each.value * each.part).sum(),
        least=each.value.min(),
        most=each.value.max(),
        covered_ns=ibis.greatest(each.end_ns - each.begin_ns, 0).sum(),
    )
    return {
        (row["name"], row["detail"]): _Series(
            row["amount"], row["least"], row["most"], float(row["covered_ns"]) / 1e9
        )
        for row in rows(sums)
    }


def gpu_facts(report: Report) -> GpuFacts | None:
    """Return what the devices did in the stage that used them most; None where none was seen."""
    resources = report.resources
    uses = [
        use
        for use in (resources.stages if resources else ())
        if use.device_s or use.gpu_busy or use.launches
    ]
    if resources is None or not uses:
        return None
    use = max(uses, key=lambda one: (one.device_s or 0.0, one.gpu_busy or 0.0))
    launches = use.launches
    return GpuFacts(
        busy=max((one.gpu_busy for one in uses if one.gpu_busy is not None), default=None),
        bound=launches.bound if launches else "",
        stage=use.stage,
        device_ms=use.device_s / resources.requests * 1e3
        if use.device_s is not None and resources.requests
        else None,
        idle_share=launches.idle_s / launches.span_s if launches and launches.span_s else None,
        memory_used_share=None,
        alloc_retries=resources.memory.alloc_retries if resources.memory else None,
        kernel=use.kernels[0].name if use.kernels else "",
    )
