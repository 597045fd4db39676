"""Memory of the run's processes from its beginning to its end."""

from __future__ import annotations

from collections.abc import Collection

from stagescope.analysis.resource_report import Memory
from stagescope.analysis.slope import slope
from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.while_running import RSS
from stagescope.analysis.window import Window, amounts, samples_in

ALLOCATOR = "model_server.torch.memory.events"
RETRIES = "num_alloc_retries"


def memory_over_run(tables: RunTables, window: Window, pids: Collection[int]) -> Memory | None:
    """Give first, last and growth of *pids* together; None where their memory was not sampled."""
    found = samples_in(tables.samples, window, RSS)
    own = found.filter(found.pid.isin(sorted(pids))).order_by("pid", "begin_ns")
    series: dict[int, list[tuple[int, float]]] = {}
    for row in rows(own.select("pid", "begin_ns", "value")):
        series.setdefault(row["pid"], []).append((row["begin_ns"], row["value"]))
    if not series:
        return None
    events = amounts(tables.samples, window, ALLOCATOR, "detail")
    return Memory(
        rss_first_bytes=sum(readings[0][1] for readings in series.values()),
        rss_last_bytes=sum(readings[-1][1] for readings in series.values()),
        slope_bytes_per_s=_growth(list(series.values())),
        alloc_retries=events.get((RETRIES,)),
    )


def _growth(series: Collection[list[tuple[int, float]]]) -> float | None:
    """Give what the processes that surely grew, grew by a second; None where none did."""
    slopes = [slope(readings) for readings in series]
    growing = [each.per_s for each in slopes if each.leak]
    return sum(growing) if growing else None
