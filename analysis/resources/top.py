"""Where the samples of each stage's code were: running or waiting, by line of the user's code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ibis.expr.types as ir

from stagescope.analysis.resources.model import Launches, TopKernel, TopStack
from stagescope.analysis.sources import RunTables, row_batches, rows
from stagescope.stacks import is_library, parse_frame
from stagescope.stages import OTHER, stage_of

TOP = 3
"""Places kept of each stage: running ones first, one of them a wait where there are waits."""

_AT_A_TIME = 2_000

AgentLocation = tuple[str, str, bool]
"""The innermost frame of the user's, the innermost function where another, and if it ran."""


@dataclass(frozen=True, slots=True)
class StageStacks:
    """The stack samples of one stage."""

    samples: int
    top: tuple[TopStack, ...]


def top_stacks(tables: RunTables, stacks: ir.Table) -> dict[str, StageStacks]:
    """Return the top places of *stacks*, which are of *tables*, by stage: full names and outer ones.

    Stacks of no stage are under `other`, those that ran only: an idle thread waits in none.
    """
    counts: dict[str, dict[AgentLocation, int]] = {}
    chosen = stacks.select("stage", "running", "samples", "frames")
    for batch in row_batches(tables, chosen, _AT_A_TIME):
        for row in batch.to_pylist():
            name, frames = row["stage"] or OTHER, row["frames"] or ()
            if frames and (row["running"] or name != OTHER):
                place = (*place_of(frames), bool(row["running"]))
                for key in {name, stage_of(name)}:
                    places = counts.setdefault(key, {})
                    places[place] = places.get(place, 0) + int(row["samples"] or 0)
    return {
        name: StageStacks(sum(places.values()), _top_stacks(places))
        for name, places in counts.items()
    }


def _top_stacks(places: Mapping[AgentLocation, int]) -> tuple[TopStack, ...]:
    whole = sum(places.values()) or 1
    order = sorted(places.items(), key=lambda item: (-item[1], item[0]))
    found = [
        TopStack(frame, leaf, running, samples, samples / whole)
        for (frame, leaf, running), samples in order
    ]
    ran = [each for each in found if each.running]
    waited = [each for each in found if not each.running]
    kept = ran[: TOP - min(1, len(waited))]
    return (*kept, *waited[: TOP - len(kept)])


def place_of(frames: Sequence[str]) -> tuple[str, str]:
    """Return the innermost frame of the user's own in *frames*, and the innermost function of all.

    Where no frame is the user's, the innermost one stands for it.
    """
    own = next((frame for frame in reversed(frames) if not _of_library(frame)), frames[-1])
    return own, "" if own == frames[-1] else parse_frame(frames[-1]).function


def _of_library(frame: str) -> bool:
    return is_library(parse_frame(frame).file or frame)


_SUM = "stage"
"""Kind of the row that sums a stage up."""


def top_kernels(kernels: ir.Table) -> dict[str, tuple[TopKernel, ...]]:
    """Return what took most time by stage, both its full name and its outer stage's.

    Kernels, copies and memsets where a device was seen; else a CPU's operators.
    """
    each = kernels.filter(kernels.kind != _SUM)
    sums = each.group_by(["stage", "kind", "name"]).aggregate(
        launches=each.launches.sum(), busy_ns=each.busy_ns.sum()
    )
    found: dict[str, dict[tuple[str, str], list[int]]] = {}
    for row in rows(sums):
        name = row["stage"] or OTHER
        for key in {name, stage_of(name)}:
            cell = found.setdefault(key, {}).setdefault((row["kind"], row["name"] or ""), [0, 0])
            cell[0] += int(row["launches"] or 0)
            cell[1] += int(row["busy_ns"] or 0)
    return {name: _top_kernels(cells) for name, cells in found.items()}


def _top_kernels(cells: Mapping[tuple[str, str], Sequence[int]]) -> tuple[TopKernel, ...]:
    on_device = {key: cell for key, cell in cells.items() if key[0] != "operator"}
    kept = on_device or cells
    whole = sum(busy for _, busy in kept.values()) or 1
    order = sorted(kept.items(), key=lambda item: (-item[1][1], item[0]))
    return tuple(
        TopKernel(kind, name, launches, busy / 1e9, busy / whole)
        for (kind, name), (launches, busy) in order[:TOP]
    )


def launches(kernels: ir.Table) -> dict[str, Launches]:
    """Return each stage's own sum over all captures, by full name and by its outer stage's."""
    own = kernels.filter(kernels.kind == _SUM)
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows(own):
        name = row["stage"] or OTHER
        for key in {name, stage_of(name)}:
            found.setdefault(key, []).append(row)
    return {name: _summed(parts) for name, parts in found.items()}


def _summed(parts: Sequence[Mapping[str, Any]]) -> Launches:
    def total(column: str) -> int:
        return sum(int(part[column] or 0) for part in parts)

    spans: dict[str, int] = {}
    for part in parts:
        word = part["bound"] or ""
        spans[word] = spans.get(word, 0) + int(part["span_ns"] or 0)
    return Launches(
        bound=max(spans, key=lambda word: (spans[word], word)),
        busy_s=total("busy_ns") / 1e9,
        span_s=total("span_ns") / 1e9,
        idle_s=total("idle_ns") / 1e9,
        host_wait_s=total("host_wait_ns") / 1e9,
        unmatched=total("unmatched"),
    )
