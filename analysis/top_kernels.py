"""What each stage launched in the run's captures: top kernels, and what bounds the stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ibis.expr.types as ir

from stagescope.analysis.resource_report import Launches, TopKernel
from stagescope.analysis.sources import rows
from stagescope.stages import OTHER, stage_of

TOP = 3
_SUM = "stage"
"""Kind of the row that sums a stage up."""


def top_kernels(kernels: ir.Table) -> dict[str, tuple[TopKernel, ...]]:
    """Give what took most time by stage, both its full name and its outer stage's.

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
    return {name: _top(cells) for name, cells in found.items()}


def _top(cells: Mapping[tuple[str, str], Sequence[int]]) -> tuple[TopKernel, ...]:
    on_device = {key: cell for key, cell in cells.items() if key[0] != "operator"}
    kept = on_device or cells
    whole = sum(busy for _, busy in kept.values()) or 1
    order = sorted(kept.items(), key=lambda item: (-item[1][1], item[0]))
    return tuple(
        TopKernel(kind, name, launches, busy / 1e9, busy / whole)
        for (kind, name), (launches, busy) in order[:TOP]
    )


def launches(kernels: ir.Table) -> dict[str, Launches]:
    """Give each stage's own sum over all captures, by full name and by its outer stage's."""
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
