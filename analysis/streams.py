"""Times between the chunks of streamed responses: between tokens, where a model streams them."""

from __future__ import annotations

import ibis.expr.types as ir

from stagescope.analysis.resource_report import Streams
from stagescope.analysis.sources import rows
from stagescope.analysis.window import Window, unprofiled, with_timeline


def chunk_gaps(server: ir.Table, window: Window) -> Streams | None:
    """Give the times between chunks of responses that began in *window*; None without streams.

    A record holds the number, sum and maximum of its gaps: so the mean and the maximum are exact
    over all gaps, and the percentile is of the responses' own means.
    """
    known = unprofiled(with_timeline(server))
    streams = known.filter((known.start_ns >= window.begin_ns) & (known.chunk_gaps > 0))
    own_mean = streams.chunk_gap_sum_ns / streams.chunk_gaps
    (row,) = rows(
        streams.aggregate(
            requests=streams.count(),
            gaps=streams.chunk_gaps.sum(),
            total=streams.chunk_gap_sum_ns.sum(),
            p99=own_mean.quantile(0.99),
            longest=streams.chunk_gap_max_ns.max(),
        )
    )
    if not row["requests"]:
        return None
    return Streams(
        requests=int(row["requests"]),
        gaps=int(row["gaps"]),
        mean_ms=float(row["total"] or 0) / int(row["gaps"]) / 1e6,
        p99_ms=float(row["p99"] or 0) / 1e6,
        max_ms=float(row["longest"] or 0) / 1e6,
    )
