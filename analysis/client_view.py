"""What the client's records alone can tell: tokens of streams, rejections, overload."""

from __future__ import annotations

import math
from typing import Any, cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.join import in_breakdown
from stagescope.analysis.report import Latency
from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.statistics import QUANTILES, quantiles_ms
from stagescope.runfolder.run import Run

REJECTIONS = (429, 503)
"""What stands before the model answers by itself when it takes no more."""
SCATTERS = 3.0
"""A Poisson count strays from its mean by more than three times its root once in 370 runs."""
GROWTH_SHARE = 0.05
"""Of the requests of half the measured phase: less growth of the backlog is no overload."""


def token_latencies(client: ir.Table) -> tuple[Latency | None, Latency | None]:
    """Return time to first token and inter-token latency of the answered streams, else None.

    The first is from `intended` until the body's first bytes; the second is, of each request, the
    time from then until the last byte, divided by the pieces that came after the first.
    """
    streams = client.filter(in_breakdown(client) & client.streamed & client.first_body_ns.notnull())
    several = streams.filter(streams.chunks > 1)
    gap_ns = (several.last_byte_ns - several.first_body_ns) / (several.chunks - 1)
    return (
        _latency("intended", streams.select(ns=streams.first_body_ns - streams.intended_ns)),
        _latency("first_body", several.select(ns=gap_ns)),
    )


def _latency(measured_from: str, times: ir.Table) -> Latency | None:
    asked: dict[str, ir.Value] = {
        "n": times.count(),
        "mean": times.ns.mean(),
        "quantiles": times.ns.quantile(list(QUANTILES)),
        "most": times.ns.max(),
    }
    (row,) = rows(times.aggregate(**asked))
    if not row["n"]:
        return None
    quantiles = quantiles_ms(row["quantiles"])
    return Latency(measured_from, row["mean"] / 1e6, *quantiles, row["most"] / 1e6)


def rejections(client: ir.Table, tables: RunTables) -> int:
    """Count measured requests that something before the server answered with 429 or 503.

    They have no server record, and none is missing. 0 where there is no server's side at all:
    then nobody knows who answered.
    """
    if tables.run.server_source == "none":
        return 0
    refused = client.filter(in_breakdown(client) & client.client_status.isin(REJECTIONS))
    server = tables.server
    alone = refused.anti_join(server, refused.client_trace_id == server.trace_id)
    (row,) = rows(alone.aggregate(n=alone.count()))
    return int(row["n"])


def in_flight(client: ir.Table, run: Run) -> tuple[int, int]:
    """Count the requests in flight in the middle and at the end of the measured phase."""
    measured = client.filter(client.measured)
    (first,) = rows(measured.aggregate(ns=measured.intended_ns.min()))
    if first["ns"] is None:
        return 0, 0
    end = int(first["ns"]) + round(run.measured_s * 1e9)
    middle = (int(first["ns"]) + end) // 2
    asked: dict[str, Any] = {"middle": _in_flight(client, middle), "end": _in_flight(client, end)}
    (row,) = rows(client.aggregate(**asked))
    return int(row["middle"] or 0), int(row["end"] or 0)


def is_overloaded(in_flight_middle: int, in_flight_end: int, count: int) -> bool:
    """Return whether the backlog grew over the second half of *count* measured requests.

    Requests in flight stay level at a server that keeps up, however long each takes, and grow
    without end at one that does not. Growth within the scatter of the arrivals is none.
    """
    half = count / 2
    return in_flight_end - in_flight_middle > max(SCATTERS * math.sqrt(half), GROWTH_SHARE * half)


def _in_flight(client: ir.Table, at_ns: int) -> ir.IntegerScalar:
    there = (client.intended_ns <= at_ns) & (client.last_byte_ns > at_ns)
    return cast(ir.IntegerScalar, ibis.ifelse(there, 1, 0).sum())
