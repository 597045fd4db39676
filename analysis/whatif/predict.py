"""Predictions: the unchanged run simulated and held against the measured one, then each change."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stagescope.analysis.build import build_report
from stagescope.analysis.sources import open_run, reading
from stagescope.analysis.whatif.changes import changed
from stagescope.analysis.whatif.model import Pipeline
from stagescope.analysis.whatif.simulate import (
    FIGURES,
    Arrivals,
    Figures,
    Scenario,
    measured_figures,
)
from stagescope.analysis.whatif.trace import read_pipeline
from stagescope.errors import UsageError

Schedule = Callable[[float], Arrivals]
"""Arrivals at another rate, as the load driver would plan them."""

TOLERANCE = {"p50_ms": (0.10, 1.0), "p99_ms": (0.20, 3.0), "throughput_per_s": (0.05, 0.5)}
"""Share and least amount by which the simulated unchanged run may differ from the measured one."""
MODEL_ERROR = {"p50_ms": 0.07, "p99_ms": 0.12, "throughput_per_s": 0.02}
"""What a prediction is taken to be off by, beyond chance, as one standard error: a guess."""
SPEEDS = (0.92, 1.08)
"""How much longer a machine may take for the same from run to run, in nine of ten runs: a guess.

Far from capacity that hardly matters; near it a few percent decide how long the queue grows, and
the interval says so.
"""
NORMAL_90 = 1.645
WORK = 20_000
"""About how many requests are simulated for one prediction."""
MOST_RUNS, LEAST_RUNS = 25, 6


@dataclass(frozen=True, slots=True)
class Estimate:
    """One predicted figure, and between what it lies in nine of ten runs."""

    value: float
    low: float | None
    """None where the simulation does not agree with the measured run: there is no confidence."""
    high: float | None


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run with *change* would show."""

    change: str
    p50_ms: Estimate
    p99_ms: Estimate
    throughput_per_s: Estimate


@dataclass(frozen=True, slots=True)
class WhatIf:
    """The answer of `stagescope whatif`, and its JSON (docs/whatif.md)."""

    folder: Path
    requests: int
    measured: Figures
    simulated: Figures
    """The same run, unchanged, by the simulation."""
    disagrees: tuple[str, ...]
    """A sentence for each figure in which the two differ by too much; empty: they agree."""
    notes: tuple[str, ...]
    predictions: tuple[Prediction, ...]

    @property
    def agrees(self) -> bool:
        """True where the simulation shows what was measured."""
        return not self.disagrees

    def to_json(self) -> dict[str, Any]:
        """Return the answer as docs/whatif.md describes it."""
        return {"schema": 1, "agrees": self.agrees} | asdict(self) | {"folder": str(self.folder)}


def predict(
    folder: Path, changes: Sequence[str], schedule: Schedule | None = None, seed: int = 0
) -> WhatIf:
    """Predict what the run in *folder* would have shown with each of *changes*.

    *schedule* makes the arrivals for `rate=`; by default those of the run are moved together or
    apart. Raises UsageError where a change is not usable, or the run cannot be simulated.
    """
    report = build_report(folder)
    if not report.valid:
        raise UsageError(
            f"{folder} cannot be simulated: the run is INVALID: {report.invalid_reasons[0]}"
        )
    tables = open_run(folder)
    try:
        with reading(folder):
            pipeline = read_pipeline(tables)
    finally:
        tables.backend.disconnect()
    return predicted(folder, pipeline, changes, schedule, seed)


def predicted(
    folder: Path,
    pipeline: Pipeline,
    changes: Sequence[str],
    schedule: Schedule | None,
    seed: int,
) -> WhatIf:
    """Return the predictions for a pipeline that was read already."""
    scenarios = [(change, *changed(pipeline, change)) for change in changes]
    arrivals = [(one.at_ms, one.measured) for one in pipeline.requests]
    measured = measured_figures(pipeline)
    simulated = Scenario(pipeline).run(arrivals, np.random.default_rng(seed), as_it_was=True)
    disagrees = tuple(_disagreements(measured, simulated))
    predictions = []
    for change, scenario, rate in scenarios:
        planned = arrivals
        if rate is not None:
            planned = list(schedule(rate) if schedule else _moved(pipeline, rate))
            if not any(inside for _, inside in planned):
                raise UsageError(f"change {change!r}: at this rate the run has no request")
            if len(planned) > 10 * WORK:
                raise UsageError(
                    f"change {change!r}: {len(planned):,} requests are too many to simulate"
                )
        ready = Scenario(scenario)
        by_speed = [_runs(ready, planned, seed, slower) for slower in (1.0, *SPEEDS)]
        estimates = {
            name: _estimate(
                name, [[run.of(name) for run in runs] for runs in by_speed], measured, simulated,
                disagrees,
            )
            for name in FIGURES
        }  # fmt: skip
        predictions.append(Prediction(change, **estimates))
    return WhatIf(
        folder, len(pipeline.requests), measured, simulated, disagrees,
        _notes(pipeline, scenarios), tuple(predictions),
    )  # fmt: skip


def _runs(scenario: Scenario, planned: Arrivals, seed: int, slower: float = 1.0) -> list[Figures]:
    """Simulate the changed run several times, each time with the measured times moved about."""
    most = MOST_RUNS if slower == 1.0 else LEAST_RUNS  # of the others the median counts alone
    count = max(LEAST_RUNS, min(most, WORK // len(planned)))
    draws = (np.random.default_rng((seed, run)) for run in range(count))
    return [scenario.run(planned, random, as_it_was=False, slower=slower) for random in draws]


def _moved(pipeline: Pipeline, rate: float) -> Arrivals:
    """Return the run's own arrivals, moved together or apart, as often as fills its time."""
    at = np.array([one.at_ms for one in pipeline.requests])
    whole_ms = pipeline.begin_ms + pipeline.measured_ms
    slower = len(at) / whole_ms * 1e3 / rate
    length = whole_ms * slower
    repeats = math.ceil(whole_ms / length)
    found = np.concatenate([at * slower + k * length for k in range(repeats)])
    return [(float(t), t >= pipeline.begin_ms) for t in found[found < whole_ms]]


def _disagreements(measured: Figures, simulated: Figures) -> list[str]:
    found = []
    for name, (share, least) in TOLERANCE.items():
        real, made = measured.of(name), simulated.of(name)
        if abs(made - real) > max(share * real, least):
            found.append(f"{name} {made:,.1f} simulated, {real:,.1f} measured")
    return found


def _estimate(
    name: str,
    by_speed: Sequence[Sequence[float]],
    measured: Figures,
    simulated: Figures,
    disagrees: Sequence[str],
) -> Estimate:
    """Return the median of the simulated runs, by as much up or down as the unchanged one was off.

    *by_speed*: the figure of each run, at the measured speed first, then at each of SPEEDS.
    """
    off = measured.of(name) / simulated.of(name) if simulated.of(name) > 0 else 1.0
    value, *others = (float(np.median(values)) * off for values in by_speed)
    if disagrees:
        return Estimate(value, None, None)
    chance = (float(each) * off for each in np.quantile(by_speed[0], [0.05, 0.95]))
    low, high = (some(one, *others) for some, one in zip((min, max), chance, strict=True))
    model = NORMAL_90 * math.hypot(MODEL_ERROR[name], off - 1) * value
    return Estimate(
        value,
        max(0.0, value - math.hypot(value - low, model)),
        value + math.hypot(high - value, model),
    )


def _notes(
    pipeline: Pipeline, scenarios: Sequence[tuple[str, Pipeline, float | None]]
) -> tuple[str, ...]:
    """Return what is not known of the run and matters for one of the *scenarios*."""
    notes = list(pipeline.notes)
    denser = any(rate is not None or made.scale or made.shift for _, made, rate in scenarios)
    for pool in pipeline.pools.values():
        if pool.size is None and denser:
            notes.append(
                f"no request waited for a thread of {', '.join(sorted(pool.stages)) or 'the pool'}: "
                f"how many there are is not known (at least {pool.seen}), none is taken to be short; "
                "where you know it, add threads=N"
            )
    for name, batcher in pipeline.batchers.items():
        if batcher.max_size is None and (denser or any("batch." in text for text, *_ in scenarios)):
            notes.append(
                f"no batch of {name} was full: its largest size is not known (at least "
                f"{batcher.largest}), none is taken to be too large; where you know it, add "
                "batch.size=N"
            )
    return tuple(notes)
