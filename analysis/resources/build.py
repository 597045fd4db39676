"""What each stage of a run used, and what ran in it: from all the tables of its folder."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from stagescope.analysis.resources.attribution import (
    COARSE,
    GPU_BUSY,
    GPU_MEMORY,
    RSS,
    Mean,
    StageWeightedMeans,
    readings,
)
from stagescope.analysis.resources.cpu import CpuByStage, cpu_by_stage, served_pids, steady_stacks
from stagescope.analysis.resources.leak import memory_over_run
from stagescope.analysis.resources.model import (
    Collector,
    Cpu,
    DeviceTotal,
    Launches,
    Resources,
    StageUse,
    TopKernel,
)
from stagescope.analysis.resources.top import StageStacks, launches, top_kernels, top_stacks
from stagescope.analysis.resources.window import (
    Window,
    amounts,
    chunk_gaps,
    requests_in,
    run_window,
    stalled_s,
)
from stagescope.analysis.sources import RunTables, rows
from stagescope.runfolder.schema import EVIDENCE
from stagescope.stages import OTHER, STAGES, SUB_STAGES, stage_of

DEVICE_TIME = "model_server.stage.device_time"
OPENINGS = ("model_server.stage.device_opened", "model_server.stage.device_timed")
"""Of stages, where device times are taken; of these, with a device time."""
COLLECTOR_TIME = "stagescope.collector.cpu_time"
_RANK = {name: index for index, name in enumerate((*STAGES, *SUB_STAGES))}


@dataclass(frozen=True, slots=True)
class _Found:
    """All that is known by stage, under full names and outer ones."""

    cpu: CpuByStage | None
    device_s: Mapping[str, float]
    means: StageWeightedMeans
    stalls_s: Mapping[str, Mapping[str, float]]
    stacks: Mapping[str, StageStacks]
    kernels: Mapping[str, tuple[TopKernel, ...]]
    launches: Mapping[str, Launches]


def stage_resources(tables: RunTables, since_ns: int | None) -> Resources | None:
    """Return what the stages of a run used from *since_ns* on; None where nothing was measured.

    *since_ns* is the begin of the measured phase on the server's clock; None: the whole run.
    """
    window = run_window(tables, since_ns)
    if window is None:
        return None
    resources = _recorded(tables, window)
    if any((tables.folder / table.file_name).exists() for table in EVIDENCE):
        resources = _sampled(tables, window, resources)
    return resources if _holds_anything(resources) else None


def _recorded(tables: RunTables, window: Window) -> Resources:
    """Return what the server's own records tell, without any sample."""
    stalls_s = stalled_s(tables.server, window)
    found = _Found(None, {}, StageWeightedMeans(()), stalls_s, {}, {}, {})
    return Resources(
        window_s=window.seconds,
        requests=requests_in(tables.server, window),
        warmup_included=window.warmup_included,
        stages=_stages(found),
        cpu=None,
        device=_device_of_batches(tables, window, None),
        gpu_window_s=None,
        memory=None,
        streams=chunk_gaps(tables.server, window),
        collectors=(),
    )


def _sampled(tables: RunTables, window: Window, recorded: Resources) -> Resources:
    """Add to *recorded* what was sampled."""
    stacks = steady_stacks(tables.stacks, window)
    pids = served_pids(tables, window, stacks)
    device = amounts(tables.samples, window, DEVICE_TIME, "detail", "device")
    means = StageWeightedMeans(readings(tables.samples, window, pids, {key[1] for key in device}))
    means.read(tables)
    device_s = _by_name(device)
    cpu = cpu_by_stage(tables, window, stacks, pids, (*means.stages(), *device_s))
    found = _Found(
        cpu=cpu,
        device_s=device_s,
        means=means,
        stalls_s=stalled_s(tables.server, window),
        stacks=top_stacks(tables, stacks),
        kernels=top_kernels(tables.kernels),
        launches=launches(tables.kernels),
    )
    return replace(
        recorded,
        stages=_stages(found),
        cpu=cpu.total if cpu else None,
        device=_device(tables, window, device_s),
        gpu_window_s=means.median_window_s(GPU_BUSY),
        memory=memory_over_run(tables, window, pids),
        collectors=_collectors(tables, window),
    )


def _by_name(device: Mapping[tuple[str, ...], float]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for (name, _), spent in device.items():
        sums[name or OTHER] = sums.get(name or OTHER, 0.0) + spent
    return sums


def _stages(found: _Found) -> tuple[StageUse, ...]:
    cpu = found.cpu.full if found.cpu and found.cpu.total.shared_out else {}
    names = {
        *cpu,
        *found.device_s,
        *found.means.stages(),
        *found.stalls_s,
        *found.stacks,
        *found.kernels,
        *found.launches,
    }
    outer = {stage_of(name) for name in names}
    return tuple(_outer(found, stage, names) for stage in in_order(outer))


def in_order(names: Iterable[str]) -> list[str]:
    """Sort stages: those of the vocabulary as a request meets them, the user's, then `other`."""
    return sorted(names, key=lambda name: (name == OTHER, _RANK.get(name, len(_RANK)), name))


def _outer(found: _Found, stage: str, names: Collection[str]) -> StageUse:
    inside = in_order(name for name in names if stage_of(name) == stage)
    cpu = found.cpu.outer if found.cpu and found.cpu.total.shared_out else {}
    inner = [_use(found, name, [name], _cpu_in(found, name)) for name in inside if name != stage]
    return _use(found, stage, inside, cpu.get(stage), sub_stages=tuple(inner))


def _cpu_in(found: _Found, name: str) -> Cpu | None:
    return found.cpu.full.get(name) if found.cpu and found.cpu.total.shared_out else None


def _use(
    found: _Found,
    name: str,
    inside: Collection[str],
    cpu: Cpu | None,
    *,
    sub_stages: tuple[StageUse, ...] = (),
) -> StageUse:
    """Return what *name* used: what the stages *inside* it, itself among them, used together."""
    busy = found.means.mean(GPU_BUSY, inside)
    stacks = found.stacks.get(name, StageStacks(0, ()))
    device = [found.device_s[each] for each in inside if each in found.device_s]
    return StageUse(
        stage=name,
        cpu=cpu,
        device_s=sum(device) if device else None,
        gpu_busy=_value(busy),
        gpu_coarse=busy is not None and busy.fill < COARSE,
        gpu_memory_bytes=_value(found.means.mean(GPU_MEMORY, inside)),
        rss_bytes=_value(found.means.mean(RSS, inside)),
        stalls_s=_stalls([found.stalls_s.get(each, {}) for each in inside]),
        stack_samples=stacks.samples,
        stacks=stacks.top,
        kernels=found.kernels.get(name, ()),
        launches=found.launches.get(name),
        sub_stages=sub_stages,
    )


def _value(mean: Mean | None) -> float | None:
    return None if mean is None else mean.value


def _stalls(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for part in parts:
        for cause, spent in part.items():
            sums[cause] = sums.get(cause, 0.0) + spent
    return sums


def _device(tables: RunTables, window: Window, device_s: Mapping[str, float]) -> DeviceTotal | None:
    """Return the device's time in all, with the share of the work that it was measured of."""
    total = sum(device_s.values()) if device_s else None
    opened, timed = (
        sum(amounts(tables.samples, window, name, "name").values()) for name in OPENINGS
    )
    if opened:
        return DeviceTotal(total, timed / opened)
    return _device_of_batches(tables, window, total)


def _device_of_batches(
    tables: RunTables, window: Window, total: float | None
) -> DeviceTotal | None:
    batches = tables.batches.filter(tables.batches.start_ns >= window.begin_ns)
    timed = (batches.device_ns.fill_null(0) > 0).sum()
    (row,) = rows(batches.aggregate(count=batches.count(), timed=timed))
    if total is None and not row["timed"]:
        return None
    coverage = int(row["timed"] or 0) / int(row["count"]) if row["count"] else None
    return DeviceTotal(total, coverage)


def _collectors(tables: RunTables, window: Window) -> tuple[Collector, ...]:
    spent = amounts(tables.samples, window, COLLECTOR_TIME, "detail")
    order = sorted(spent.items(), key=lambda item: (-item[1], item[0]))
    return tuple(Collector(name, cpu_s, cpu_s / window.seconds) for (name,), cpu_s in order)


def _holds_anything(resources: Resources) -> bool:
    return any(
        (
            resources.stages,
            resources.cpu,
            resources.device,
            resources.memory,
            resources.streams,
            resources.collectors,
        )
    )
