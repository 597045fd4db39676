"""What the host and its devices did in a run, for the verdict: from samples, none of it by stage."""

from __future__ import annotations

import ibis

from stagescope.analysis.report import Report
from stagescope.analysis.resources.window import Window, amounts, run_window, samples_in
from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.verdict.model import GpuFacts, HostFacts

IDLE = ("idle", "iowait")


def host_facts(tables: RunTables, report: Report) -> HostFacts:
    """Return what the samples of the host say of the run's time."""
    run = report.run
    window = run_window(tables, None)
    cores = run.host.cores
    driver = run.driver.get("cpu_share")
    if window is None:
        return HostFacts(cores, None, None, driver, None, None, None, 0.0)
    seconds = window.seconds
    modes = amounts(tables.samples, window, "system.cpu.time", "detail")
    busy = sum(spent for (mode,), spent in modes.items() if mode not in IDLE) if modes else None
    throttled = amounts(tables.samples, window, "stagescope.cgroup.cpu.throttled_time", "detail")
    resources = report.resources
    memory = resources.memory if resources else None
    cpu = resources.cpu if resources else None
    covered = _covered(tables, window, "system.cpu.time")
    return HostFacts(
        cores=cores,
        busy_cores=_scaled(busy, seconds * covered),
        server_cores=cpu.cpu_s / resources.window_s if cpu and resources else None,
        driver_cores=driver,
        agent_cores=sum(one.core_share for one in resources.collectors) if resources else None,
        cgroup_limit=_least(tables, window, "stagescope.cgroup.cpu.limit"),
        throttled_share=_scaled(sum(throttled.values()), seconds) if throttled else None,
        sampled_share=covered,
        rss_first_bytes=memory.rss_first_bytes if memory else None,
        rss_last_bytes=memory.rss_last_bytes if memory else None,
        leak_bytes_per_s=memory.slope_bytes_per_s if memory else None,
        major_faults_per_s=_major_faults(tables, window),
        memory_limit_hits=_sum(tables, window, "stagescope.cgroup.memory.limit_hits"),
        memory_used_share=_memory_used(tables, window),
    )


def _scaled(amount: float | None, seconds: float) -> float | None:
    return amount / seconds if amount is not None and seconds > 0 else None


def _sum(tables: RunTables, window: Window, name: str) -> float | None:
    found = amounts(tables.samples, window, name, "detail")
    return sum(found.values()) if found else None


def _major_faults(tables: RunTables, window: Window) -> float | None:
    found = amounts(tables.samples, window, "process.paging.faults", "detail")
    many = [amount for (kind,), amount in found.items() if kind == "major"]
    return sum(many) / window.seconds if many else None


def _least(tables: RunTables, window: Window, name: str) -> float | None:
    found = samples_in(tables.samples, window, name)
    (row,) = rows(found.aggregate(least=found.value.min()))
    return None if row["least"] is None else float(row["least"])


def _memory_used(tables: RunTables, window: Window) -> float | None:
    used = samples_in(tables.samples, window, "system.memory.usage")
    limit = samples_in(tables.samples, window, "system.memory.limit")
    (most,) = rows(used.aggregate(most=used.value.max()))
    (whole,) = rows(limit.aggregate(whole=limit.value.max()))
    return most["most"] / whole["whole"] if most["most"] and whole["whole"] else None


def _covered(tables: RunTables, window: Window, name: str) -> float:
    """Return the share of *window* that the samples called *name* tell of."""
    found = samples_in(tables.samples, window, name)
    each = found.select("begin_ns", "end_ns").distinct()
    (row,) = rows(each.aggregate(ns=ibis.greatest(each.end_ns - each.begin_ns, 0).sum()))
    return min(1.0, float(row["ns"] or 0) / 1e9 / window.seconds)


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
