"""What reading a GPU by NVML costs and gives: `python benchmarks/gpu_nvml.py > figures.json`.

Another process keeps the GPU busy meanwhile (gpu_busy.py). `--cpu` has it keep a core busy
instead: to try the script on the stand-in for NVIDIA's library. Each figure is of GPU 0.
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Final

from gpu_busy import Busy, busy
from gpu_nvml_effect import in_turns

from stagescope.agent.gpu.nvml import NvmlProbe
from stagescope.agent.gpu.nvml_calls import Calls
from stagescope.agent.gpu.nvml_counters import FAST, POWER_INSTANT, SLOW, number
from stagescope.agent.gpu.nvml_gpm import Gpm
from stagescope.agent.gpu.nvml_readings import Moment
from stagescope.agent.gpu.probe import NoGpu, Tier
from stagescope.agent.log_once import LogOnce
from stagescope.samples import Sample

POLL_EVERY_S: Final = 0.1
NEVER_SLOW_S: Final = 60.0
"""No call is made rarer for what it takes: that is what is measured."""

BUFFERS: Final = {
    "power": 0, "gpu": 1, "memory": 2, "encoder": 3, "decoder": 4, "sm_clock": 5,
    "memory_clock": 6, "module_power": 7, "jpeg": 8, "optical_flow": 9,
}  # fmt: skip
"""nvmlSamplingType_t."""

TIERS: Final[tuple[Tier, ...]] = ("fast", "slow")


@dataclass(frozen=True, slots=True)
class Plan:
    """On what it is measured, and how long."""

    device: str = "cuda"
    """That the other process keeps busy."""
    polls: int = 30
    """A tenth of a second apart, of all that is read."""
    again_s: float = 2.0
    """From one look into the driver's buffers to the next."""
    gpm_windows: tuple[tuple[float, int], ...] = ((0.1, 20), (0.2, 10), (0.5, 6), (1.0, 4))
    """Seconds between two readings, and how many."""
    rounds: int = 5
    turn_s: float = 2.5
    reads: int = 15
    """Of counters before, between and after captures; a tenth of a second apart."""


REAL: Final = Plan()
TRIAL: Final = Plan("cpu", 6, 0.3, ((0.1, 3), (1.0, 1)), 2, 0.8, 5)

Figures = dict[str, Any]


def calls(plan: Plan = REAL) -> Figures:
    """Return the median of each call of ours, with the GPU at rest and busy."""
    at_rest = _polled(plan.polls)
    with busy(plan.device):
        return {"at_rest": at_rest, "busy": _polled(plan.polls)}


def _polled(polls: int) -> Figures:
    probe = NvmlProbe(slow_s=NEVER_SLOW_S)
    found: dict[str, list[float]] = defaultdict(list)
    gives: set[str] = set()
    try:
        for turn in range(polls):
            for tier in TIERS:
                begun = time.perf_counter_ns()
                samples = probe.poll(tier)
                gives.update(one.name for one in samples)
                if turn:  # the first finds out which devices there are
                    found[f"{tier} poll"].append((time.perf_counter_ns() - begun) / 1e3)
            for one in samples:
                if one.name == "stagescope.nvml.call_time":
                    found[one.detail].append(one.value * 1e6)
            time.sleep(POLL_EVERY_S)
    finally:
        probe.stop()
        probe.close()
    return {
        "calls": {
            name: {"median_us": median(us), "highest_us": max(us)} for name, us in found.items()
        },
        "gives": sorted(gives),
    }


@contextmanager
def _handle() -> Iterator[tuple[Calls, Any, str]]:
    """Yield what calls the library, and the first GPU: its handle and UUID. Raises NVMLError."""
    import pynvml

    pynvml.nvmlInit()
    try:
        made = Calls(pynvml, LogOnce("gpu: "), NEVER_SLOW_S)
        handle = made("nvmlDeviceGetHandleByIndex", 0)
        yield made, handle, str(made("nvmlDeviceGetUUID", handle))
    finally:
        pynvml.nvmlShutdown()


def buffers(plan: Plan = REAL) -> Figures:
    """Return length and period of each buffer, or why it is not to be had."""
    with busy(plan.device), _handle() as (made, handle, _):
        time.sleep(plan.again_s)
        first = {name: _fetched(made, handle, kind) for name, kind in BUFFERS.items()}
        time.sleep(plan.again_s)
        return {
            "looked_again_after_s": plan.again_s,
            **{name: _of_buffer(made, handle, kind, first[name]) for name, kind in BUFFERS.items()},
        }


def _fetched(made: Calls, handle: Any, kind: int, last_us: int = 0) -> Any:
    try:
        return made("nvmlDeviceGetSamples", handle, kind, last_us)
    except made.nvml.NVMLError as error:
        return error


def _of_buffer(made: Calls, handle: Any, kind: int, first: Any) -> Figures:
    if isinstance(first, made.nvml.NVMLError):
        return {"refused": str(first), "code": first.value}
    value_type, found = first
    stamps = sorted(one.timeStamp for one in found if one.timeStamp)
    if not stamps:
        return {"readings": 0}
    gaps_ms = [(after - before) / 1e3 for before, after in pairwise(stamps)]
    told: Figures = {
        "readings": len(stamps),
        "span_s": (stamps[-1] - stamps[0]) / 1e6,
        "period_ms": median(gaps_ms) if gaps_ms else None,
        "shortest_ms": min(gaps_ms, default=None),
        "longest_ms": max(gaps_ms, default=None),
        "value_type": value_type,
        "last_value": number(found[-1].sampleValue, value_type),
    }
    again = _fetched(made, handle, kind, stamps[-1])
    now_us = time.time_ns() // 1000
    news = [] if isinstance(again, made.nvml.NVMLError) else [
        one.timeStamp for one in again[1] if one.timeStamp > stamps[-1]
    ]  # fmt: skip
    return told | {
        "new_then": len(news),
        "newest_age_ms": (now_us - max(news)) / 1e3 if news else None,
    }


def fields() -> list[Figures]:
    """Return which field values are answered, all in one call."""
    wanted = (*FAST, *SLOW, POWER_INSTANT)
    with _handle() as (made, handle, _):
        values = made(
            "nvmlDeviceGetFieldValues", handle, [(field.id, field.scope) for field in wanted]
        )
        return [
            {
                "id": field.id, "name": field.name, "detail": field.detail,
                "code": value.nvmlReturn, "value_type": value.valueType,
                "value": None if value.nvmlReturn else number(value.value, value.valueType),
            }
            for field, value in zip(wanted, values, strict=True)
        ]  # fmt: skip


def gpm(plan: Plan = REAL) -> Figures:
    """Return what hardware counters cost and tell, by the time between two readings."""
    with busy(plan.device), _handle() as (made, handle, uuid):
        answer = made("nvmlGpmQueryDeviceSupport", handle)
        if not answer.isSupportedDevice:
            return {"supported": False}
        return {
            "supported": True,
            **{
                f"{s:g} s": _read_gpm(made, handle, uuid, s, count) for s, count in plan.gpm_windows
            },
        }


def _read_gpm(made: Calls, handle: Any, uuid: str, every_s: float, count: int) -> Figures:
    gpm = Gpm(made, handle, uuid, allowed=lambda: True)
    took_us: list[float] = []
    values: dict[str, list[float]] = defaultdict(list)
    try:
        for _ in range(count + 1):
            begun = time.perf_counter_ns()
            samples = gpm.read(_now())
            took_us.append((time.perf_counter_ns() - begun) / 1e3)
            for name, value in _by_name(samples).items():
                values[name].append(value)
            time.sleep(every_s)
    finally:
        gpm.close()
    return {
        "reading_us": median(took_us[1:]),
        "longest_us": max(took_us[1:]),
        "calls_us": {name: s * 1e6 for name, s in made.medians().items() if "Gpm" in name},
        "values": {
            name: {"median": median(of), "lowest": min(of), "highest": max(of)}
            for name, of in values.items()
        },
    }


def _now() -> Moment:
    return Moment(time.monotonic_ns(), time.time_ns())


def _by_name(samples: Sequence[Sample]) -> dict[str, float]:
    return {f"{one.name} {one.detail}".strip(): one.value for one in samples}


def effect(plan: Plan = REAL) -> Figures:
    """Return what batches take while the sampler runs and while not."""
    return in_turns(plan.device, plan.rounds, plan.turn_s)


def gpm_beside_capture(plan: Plan = REAL) -> Figures:
    """Read counters each tenth of a second while torch's profiler records kernels, twice."""
    reads: list[Figures] = []
    with busy(plan.device) as child, _handle() as (made, handle, uuid):
        counters = Gpm(made, handle, uuid, allowed=lambda: True)
        try:
            for _ in range(2):
                _note_reads(made, counters, reads, plan.reads)
                child.capture()
                _note_reads(made, counters, reads, plan.reads)
            _note_reads(made, counters, reads, plan.reads)
            captures = _told(child)
        finally:
            counters.close()
    for one in captures:
        one["reads"] = [
            read for read in reads
            if read["until_ns"] > one["begun_ns"] and read["since_ns"] < one["ended_ns"]
        ]  # fmt: skip
    beside = [read["at"] for one in captures for read in one["reads"]]
    return {
        "captures": captures,
        "outside": [read for read in reads if read["at"] not in beside],
        "refused": sum(1 for read in reads if read["refused"]),
    }


def _told(child: Busy) -> list[Figures]:
    captures: list[Figures] = child.end()["captures"]
    return captures


def _note_reads(made: Calls, counters: Gpm, reads: list[Figures], count: int) -> None:
    for _ in range(count):
        before, refused, values = time.monotonic_ns(), "", {}
        try:
            values = _by_name(counters.read(_now()))
        except made.nvml.NVMLError as error:
            refused = str(error)
        since_ns = reads[-1]["until_ns"] if reads else before
        reads.append({"at": len(reads), "since_ns": since_ns, "until_ns": before,
                      "values": values, "refused": refused})  # fmt: skip
        time.sleep(POLL_EVERY_S)


PARTS: Final[Mapping[str, Callable[[], object]]] = {
    "fields": fields,
    "calls": calls,
    "buffers": buffers,
    "gpm": gpm,
    "gpm_beside_capture": gpm_beside_capture,
    "effect": effect,
}


def measure(plan: Plan = REAL) -> Figures:
    """Measure all."""
    parts = (calls, buffers, gpm, gpm_beside_capture, effect)
    return {"fields": fields(), **{part.__name__: part(plan) for part in parts}}


def main(words: Sequence[str]) -> int:
    """Print the figures; say so where there is no library, or no GPU."""
    try:
        NvmlProbe().close()
    except (NoGpu, ImportError) as why:
        print(f"gpu_nvml: {why}, so there is nothing to measure", file=sys.stderr)
        return 1
    json.dump(measure(TRIAL if "--cpu" in words else REAL), sys.stdout, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
