"""Memory of the run's processes from its beginning to its end."""

from __future__ import annotations

from collections.abc import Collection

from stagescope.analysis.resource_report import Memory
from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.while_running import RSS
from stagescope.analysis.window import Window, amounts, samples_in

ALLOCATOR = "model_server.torch.memory.events"
RETRIES = "num_alloc_retries"


def memory_over_run(tables: RunTables, window: Window, pids: Collection[int]) -> Memory | None:
    """Give first, last and slope of *pids* together; None where their memory was not sampled."""
    found = samples_in(tables.samples, window, RSS)
    own = found.filter(found.pid.isin(sorted(pids)))
    ends = own.group_by("pid").aggregate(
        first=own.value.argmin(own.begin_ns), last=own.value.argmax(own.begin_ns)
    )
    each = rows(ends)
    if not each:
        return None
    events = amounts(tables.samples, window, ALLOCATOR, "detail")
    return Memory(
        rss_first_bytes=sum(float(row["first"]) for row in each),
        rss_last_bytes=sum(float(row["last"]) for row in each),
        slope_bytes_per_s=None,
        alloc_retries=events.get((RETRIES,)),
    )
