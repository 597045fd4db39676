"""How long each stage's requests stood still, by cause: loop lag, garbage collector, captures."""

from __future__ import annotations

import ibis.expr.types as ir

from stagescope.analysis.sources import rows
from stagescope.analysis.window import Window, with_timeline
from stagescope.stalls import CAPTURE


def stalled_s(server: ir.Table, window: Window) -> dict[str, dict[str, float]]:
    """Give seconds by full stage name and cause, of requests that began in *window*.

    Summed over requests: ten that stood still together for one second are ten seconds.
    Of profiled requests only the capture itself counts.
    """
    known = with_timeline(server)
    inside = known.filter((known.start_ns >= window.begin_ns) & known.stalls.notnull())
    each = inside.select(stall=inside.stalls.unnest(), profiled=inside.profiled.fill_null(False))
    flat = each.select(
        "profiled",
        stage=each.stall["stage"],
        cause=each.stall["cause"],
        stall_ns=each.stall["stall_ns"],
    )
    kept = flat.filter(~flat.profiled | (flat.cause == CAPTURE))
    sums = kept.group_by(["stage", "cause"]).aggregate(total_ns=kept.stall_ns.sum())
    found: dict[str, dict[str, float]] = {}
    for row in rows(sums.order_by("stage", "cause")):
        found.setdefault(row["stage"], {})[row["cause"]] = int(row["total_ns"]) / 1e9
    return found
