"""Mean, percentiles and the slowest requests' mean of many columns, in two queries.

Percentiles are of each column by itself, interpolated linearly between the two nearest ranks
(method 7 of Hyndman and Fan 1996; NumPy's default): so they do not add up, and only means do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ibis
import ibis.expr.types as ir

from stagescope.analysis.sources import rows

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
    table: ir.Table, columns: Sequence[str], count: int, by: str = "latency_ns"
) -> dict[str, Figures]:
    """Give the figures of *columns* (ns) of *table*, which has *count* rows, at least one.

    The slowest are the `count // 100` rows, at least one, with the largest *by*,
    which is one of *columns*.
    """
    whole = _query(table, columns, quantiles=True)
    # At least as many rows as are asked for lie at or above the p99; to sort those is enough.
    p99 = math.floor(whole[f"quantiles_{columns.index(by)}"][-1])
    tail = table.filter(table[by] >= p99)
    slowest = tail.order_by([ibis.desc(by), "seq"]).limit(max(1, count // SLOWEST))
    slow = _query(slowest, columns, quantiles=False)
    return {
        column: Figures(
            whole[f"mean_{index}"] / 1e6,
            *quantiles_ms(whole[f"quantiles_{index}"]),
            slow[f"mean_{index}"] / 1e6,
        )
        for index, column in enumerate(columns)
    }


def quantiles_ms(quantiles_ns: Sequence[float]) -> tuple[float, float, float]:
    """Turn the answer to QUANTILES into ms."""
    p50, p95, p99 = quantiles_ns
    return p50 / 1e6, p95 / 1e6, p99 / 1e6


def _query(table: ir.Table, columns: Sequence[str], *, quantiles: bool) -> dict[str, Any]:
    asked: dict[str, ir.Value] = {}
    for index, column in enumerate(columns):
        asked[f"mean_{index}"] = table[column].mean()
        if quantiles:
            asked[f"quantiles_{index}"] = table[column].quantile(list(QUANTILES))
    (row,) = rows(table.aggregate(**asked))
    return row
