"""A process's CPU time, shared out among stages by where its stack samples were."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from stagescope.analysis.resource_report import Cpu


@dataclass(frozen=True, slots=True)
class Running:
    """Running stack samples of one process in one stage."""

    pid: int
    stage: str
    weight_ns: int
    """What the samples stand for: samples times period."""
    samples: int


def shared_out(
    cpu_s: Mapping[int, float],
    running: Iterable[Running],
    stages: Iterable[str],
    name_of: Callable[[str], str],
) -> tuple[dict[str, Cpu], float]:
    """Give CPU time by *name_of* the stage, and that of processes without a sample.

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
    """Give the standard error of a *share* seen in *count* samples, taken to be independent.

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
