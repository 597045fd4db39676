"""What served processes waited for, of several added up: sums that grow, and what comes and goes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

from stagescope.recorder import format as fmt

LONGEST: Final = tuple(name for name in fmt.WAITS if name.endswith("_max") or "_max_" in name)
"""Of several processes the largest counts."""
PASSING: Final = ("pool_threads", "pool_busy", "pool_waiting", *LONGEST)
"""Of a process that is gone nothing stays."""
GROWING: Final = tuple(name for name in fmt.WAITS if name not in PASSING)


def summed(waits: Iterable[Mapping[str, int]], names: Iterable[str]) -> dict[str, int]:
    """Add up *waits* of several processes, by each of *names*."""
    every = list(waits)
    sums: dict[str, int] = {}
    for name in names:
        figures = [figures.get(name, 0) for figures in every]
        sums[name] = max(figures, default=0) if name in LONGEST else sum(figures)
    return sums
