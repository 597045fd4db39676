"""The changes that can be asked for, and what each does to a pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

from stagescope.analysis.whatif.model import Batcher, Pipeline
from stagescope.errors import UsageError

FORMS = (
    "'STAGE -20%', 'STAGE +3ms', threads=N, threads.STAGE=N, batch.delay=Nms, batch.size=N, "
    "workers=N or rate=N"
)
MOST_THREADS, MOST_WORKERS, MOST_BATCH, MOST_MS, MOST_RATE = 10_000, 256, 100_000, 3.6e6, 1e5
TIMER_LATE_MS = 0.6
"""By how much a batcher's timer comes late, typically: event loops sleep in whole milliseconds."""

_STAGE = re.compile(r"([A-Za-z_][\w.]*)\s*([+-]\d+(?:\.\d+)?)\s*(%|ms)")
_SETTING = re.compile(r"([a-z]+(?:\.[A-Za-z_]\w*)*)\s*=\s*(\d+(?:\.\d+)?)\s*(ms|/s|)")


def changed(pipeline: Pipeline, text: str) -> tuple[Pipeline, float | None]:
    """Return *pipeline* with the changes in *text*, `,` between them, and the rate they ask for.

    Raises UsageError, which names the change and what would be usable.
    """
    rate: float | None = None
    for one in (part.strip() for part in text.split(",")):
        if match := _STAGE.fullmatch(one):
            pipeline = _stage(pipeline, one, match[1], float(match[2]), match[3])
            continue
        setting = _SETTING.fullmatch(one)
        if setting is None:
            raise UsageError(f"change {one!r} is not understood: give {FORMS}")
        name, value, unit = setting[1], float(setting[2]), setting[3]
        if name == "rate" and unit in ("", "/s"):
            rate = _within(one, value, 0.01, MOST_RATE)
        else:
            pipeline = _setting(pipeline, one, name, value, unit)
    return pipeline, rate


def _stage(pipeline: Pipeline, text: str, name: str, value: float, unit: str) -> Pipeline:
    stages = pipeline.stages
    if not any(stage == name or stage.startswith(f"{name}.") for stage in stages):
        known = ", ".join(sorted(stages - {"client_wait"}))
        raise UsageError(f"change {text!r}: this run has no stage {name}; it has {known}")
    if unit == "ms":
        _within(text, abs(value), 0, MOST_MS)
        return replace(pipeline, shift={**pipeline.shift, name: value})
    if value < -100:
        raise UsageError(f"change {text!r}: a stage cannot take less than no time, -100%")
    _within(text, value, -100, 100_000)
    return replace(pipeline, scale={**pipeline.scale, name: 1 + value / 100})


def _setting(pipeline: Pipeline, text: str, name: str, value: float, unit: str) -> Pipeline:
    head, _, rest = name.partition(".")
    if name == "batch.delay" and unit == "ms":
        delay_ms = _within(text, value, 0, MOST_MS)
        late_ms = TIMER_LATE_MS if delay_ms else 0.0
        return _batchers(pipeline, text, lambda one: replace(one, delay_ms=delay_ms + late_ms))
    if unit or value != int(value):
        raise UsageError(f"change {text!r} is not understood: give {FORMS}")
    if name == "batch.size":
        size = int(_within(text, value, 1, MOST_BATCH))
        return _batchers(pipeline, text, lambda one: replace(one, max_size=size))
    if name == "workers":
        processes = int(_within(text, value, 1, MOST_WORKERS))
        other = processes != pipeline.processes
        return replace(pipeline, processes=processes, spread=other or pipeline.spread)
    if head == "threads":
        return _threads(pipeline, text, rest, int(_within(text, value, 1, MOST_THREADS)))
    raise UsageError(f"change {text!r} is not understood: give {FORMS}")


def _batchers(pipeline: Pipeline, text: str, change: Callable[[Batcher], Batcher]) -> Pipeline:
    if not pipeline.batchers:
        raise UsageError(f"change {text!r}: this run has no batches")
    made = {name: change(one) for name, one in pipeline.batchers.items()}
    return replace(pipeline, batchers=made)


def _threads(pipeline: Pipeline, text: str, stage: str, size: int) -> Pipeline:
    chosen = {name for name, pool in pipeline.pools.items() if not stage or stage in pool.stages}
    if not chosen:
        where = f"for {stage}" if stage else "for a request"
        raise UsageError(f"change {text!r}: no worker thread was seen to work {where} in this run")
    return replace(
        pipeline,
        pools={
            name: replace(pool, size=size) if name in chosen else pool
            for name, pool in pipeline.pools.items()
        },
    )


def _within(text: str, value: float, least: float, most: float) -> float:
    if not least <= value <= most:
        raise UsageError(f"change {text!r}: give a number from {least:g} to {most:,.0f}")
    return value
