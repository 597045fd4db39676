"""What the client saw: counts, errors and latency of the measured phase, joined or not."""

from __future__ import annotations

from typing import Any

import ibis
import ibis.expr.types as ir

from stagescope.analysis.figures import QUANTILES, quantiles_ms
from stagescope.analysis.report import Client, Latency
from stagescope.analysis.sources import rows
from stagescope.run_folder import Run


def client_side(client: ir.Table, run: Run) -> tuple[Client, int]:
    """Give the client's figures, and how many requests failed before a byte was sent.

    *client* is `join.client_columns`.
    """
    measured = client.filter(client.measured).mutate(
        error=ibis.ifelse(client.answered, "", _word(client))
    )
    outcomes = rows(_outcomes(measured))
    answered = sum(row["n"] for row in outcomes if row["answered"])
    failed = sum(row["n"] for row in outcomes if not row["answered"])
    profiled = sum(row["profiled"] for row in outcomes if row["answered"])
    timed = measured.filter(measured.answered & ~measured.profiled)
    latency, service = _latencies(timed) if answered > profiled else (None, None)
    return Client(
        planned=int(run.driver.get("planned", 0)),
        count=answered + failed,
        answered=answered,
        profiled=profiled,
        failed=failed,
        asked_rate_per_s=run.plan.rate_per_s,
        achieved_rate_per_s=_answers_per_s(client, run.measured_s),
        errors=_sums(outcomes, "error", answered=False),
        status=_sums(outcomes, "status", answered=True),
        latency=latency,
        service_time=service,
    ), sum(row["unsent"] for row in outcomes if not row["answered"])


def _answers_per_s(client: ir.Table, measured_s: float) -> float:
    """Give the answers that came within the measured phase, per second of it.

    To whichever requests, warm-up included: beyond its capacity a server answers the plan's
    requests long after the plan has ended, and counting those would show the rate asked for.
    """
    begin = client.filter(client.measured).intended_ns.min().as_scalar()
    since = client.last_byte_ns - begin
    inside = client.answered & (since >= 0) & (since <= round(measured_s * 1e9))
    (row,) = rows(client.aggregate(n=inside.sum()))
    return int(row["n"] or 0) / measured_s if measured_s > 0 else 0.0


def _word(client: ir.Table) -> ir.Value:
    word = client.client_error.fill_null("")
    return ibis.ifelse(word == "", "no response", word)


def _outcomes(measured: ir.Table) -> ir.Table:
    known = measured.mutate(
        status=ibis.ifelse(
            measured.answered,
            (measured.client_status // 100).cast("string") + "xx",
            "",
        ),
    )
    return known.group_by(["answered", "error", "status"]).aggregate(
        n=known.count(), unsent=known.unsent.sum(), profiled=known.profiled.sum()
    )


def _sums(outcomes: list[dict[str, Any]], key: str, *, answered: bool) -> dict[str, int]:
    """Give counts by *key*, the most frequent first."""
    sums: dict[str, int] = {}
    for row in outcomes:
        if row["answered"] == answered:
            sums[row[key]] = sums.get(row[key], 0) + int(row["n"])
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _latencies(answered: ir.Table) -> tuple[Latency, Latency]:
    t = answered.select(
        intended=answered.last_byte_ns - answered.intended_ns,
        sent=answered.last_byte_ns - answered.sent_ns,
    )
    asked: dict[str, ir.Value] = {}
    for name in t.columns:
        asked[f"{name}_mean"] = t[name].mean()
        asked[f"{name}_quantiles"] = t[name].quantile(list(QUANTILES))
        asked[f"{name}_max"] = t[name].max()
    (row,) = rows(t.aggregate(**asked))
    latency, service = (
        Latency(
            name,
            row[f"{name}_mean"] / 1e6,
            *quantiles_ms(row[f"{name}_quantiles"]),
            row[f"{name}_max"] / 1e6,
        )
        for name in t.columns
    )
    return latency, service
