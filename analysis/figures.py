"""Mean, percentiles and the slowest requests' mean of many columns, in two queries.

Percentiles are of each column by itself, interpolated linearly between the two nearest ranks
(method 7 of Hyndman and Fan 1996; NumPy's default): so they do not add up, and only means do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.sources import RunTables, rows, rows_together

QUANTILES = (0.5, 0.95, 0.99)
SLOWEST = 100
"""One request in so many, by client latency, is among the slowest; at least one is."""


@dataclass(frozen=True, slots=True)
class Figures:
    """One column's figures, in ms."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    slowest_ms: float
    """Mean over the slowest requests."""


def figures(
    tables: RunTables, table: ir.Table, columns: Sequence[str], count: int, by: str = "latency_ns"
) -> dict[str, Figures]:
    """Give the figures of *columns* (ns) of *table*, which has *count* rows, at least one.

    The slowest are the `count // 100` rows, at least one, with the largest *by*,
    which is one of *columns*. *table* is of the engine of *tables*.
    """
    halves = [part for part in (columns[::2], columns[1::2]) if part]
    whole: dict[str, Any] = {}
    for (row,) in rows_together(tables, [_whole(table, half) for half in halves]):
        whole |= row
    # At least as many rows as are asked for lie at or above the p99; to sort those is enough.
    tail = table.filter(table[by] >= math.floor(whole[f"quantiles_{by}"][-1]))
    slowest = tail.order_by([ibis.desc(by), "seq"]).limit(max(1, count // SLOWEST))
    (slow,) = rows(slowest.aggregate(**{name: slowest[name].mean() for name in columns}))
    return {
        name: Figures(
            whole[f"mean_{name}"] / 1e6,
            *quantiles_ms(whole[f"quantiles_{name}"]),
            slow[name] / 1e6,
        )
        for name in columns
    }


def quantiles_ms(quantiles_ns: Sequence[float]) -> tuple[float, float, float]:
    """Turn the answer to QUANTILES into ms."""
    p50, p95, p99 = quantiles_ns
    return p50 / 1e6, p95 / 1e6, p99 / 1e6


def _whole(table: ir.Table, columns: Sequence[str]) -> ir.Table:
    """Ask for mean and percentiles of *columns*."""
    asked: dict[str, ir.Value] = {}
    for name in columns:
        asked[f"mean_{name}"] = table[name].mean()
        asked[f"quantiles_{name}"] = table[name].quantile(list(QUANTILES))
    return cast(ir.Table, table.aggregate(**asked))
