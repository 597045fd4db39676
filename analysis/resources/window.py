"""The stretch of the server's clock that a run's resources cover."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.resources.model import Streams
from stagescope.analysis.sources import RunTables, rows
from stagescope.stages import CAPTURE


@dataclass(frozen=True, slots=True)
class Window:
    """From begin to end, ns on the monotonic clock of the server's host."""

    begin_ns: int
    end_ns: int
    warmup_included: bool

    @property
    def seconds(self) -> float:
        """Return its length in seconds."""
        return (self.end_ns - self.begin_ns) / 1e9


def with_timeline(server: ir.Table) -> ir.Table:
    """Return those rows of *server* whose times are on the clock of the server's host."""
    exact = server.source.fill_null("agent") == "agent"
    return cast(ir.Table, server.filter(exact & server.start_ns.notnull()))


def unprofiled(server: ir.Table) -> ir.Table:
    """Return the rows of *server* during which no capture was at work, as far as is known."""
    return cast(ir.Table, server.filter(~server.profiled.fill_null(False)))


def run_window(tables: RunTables, since_ns: int | None) -> Window | None:
    """Return the run's window; None where no row of the server has a time.

    It begins at *since_ns*, the measured phase's first moment, or with the first request where
    that is not known, and ends with the last request.
    """
    known = with_timeline(tables.server)
    end = (known.start_ns + known.duration_ns).max()
    (row,) = rows(known.aggregate(begin=known.start_ns.min(), end=end))
    if row["begin"] is None:
        return None
    begin = int(row["begin"]) if since_ns is None else since_ns
    if row["end"] <= begin:
        return None
    return Window(begin, int(row["end"]), warmup_included=since_ns is None)


def requests_in(server: ir.Table, window: Window) -> int:
    """Return how many requests began in *window*."""
    known = with_timeline(server)
    began = known.filter(known.start_ns >= window.begin_ns)
    (row,) = rows(began.aggregate(count=began.count()))
    return int(row["count"])


def samples_in(samples: ir.Table, window: Window, *names: str) -> ir.Table:
    """Return the samples called one of *names* that lie in *window*, or partly, cut to it.

    `part` is the share of each sample's own stretch that lies in the window; 1 for a moment.
    Null ids read as those of no process, no device and no detail.
    """
    # A stretch that ends where the window begins has nothing in it; a moment there has.
    moment = samples.start_ns == samples.end_ns
    ends_inside = (samples.end_ns > window.begin_ns) | (
        moment & (samples.end_ns == window.begin_ns)
    )
    known = samples.filter(
        samples.name.isin(names)
        & samples.value.notnull()
        & ends_inside
        & (samples.start_ns < window.end_ns)
    )
    begin = ibis.greatest(known.start_ns, window.begin_ns)
    end = ibis.least(known.end_ns, window.end_ns)
    length = known.end_ns - known.start_ns
    part = ibis.ifelse(length > 0, (end - begin) / length, 1.0)
    return cast(
        ir.Table,
        known.select(
            "name",
            "value",
            begin_ns=begin,
            end_ns=end,
            part=part,
            pid=known.pid.fill_null(0),
            device=known.device.fill_null(""),
            detail=known.detail.fill_null(""),
        ),
    )


def amounts(samples: ir.Table, window: Window, name: str, *by: str) -> dict[tuple[str, ...], float]:
    """Return how much of *name* there was in *window*, by the columns *by*, as text."""
    found = samples_in(samples, window, name)
    keys = {f"key_{column}": found[column].cast("string") for column in by}
    sums = found.select(amount=found.value * found.part, **keys)
    grouped = sums.group_by(list(keys)).aggregate(amount=sums.amount.sum())
    return {tuple(row[key] for key in keys): float(row["amount"]) for row in rows(grouped)}


def stalled_s(server: ir.Table, window: Window) -> dict[str, dict[str, float]]:
    """Return seconds by full stage name and cause, of requests that began in *window*.

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


def chunk_gaps(server: ir.Table, window: Window) -> Streams | None:
    """Return the times between chunks of responses that began in *window*; None without streams.

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
