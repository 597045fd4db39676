"""Mean, percentiles and the slowest requests' mean of many columns, in two queries.

Percentiles are of each column by itself, interpolated linearly between the two nearest ranks
(method 7 of Hyndman and Fan 1996; NumPy's default): so they do not add up, and only means do.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.intervals import ranks
from stagescope.analysis.report import Batches, Client, Instrument, Latency, Unmatched
from stagescope.analysis.sources import RunTables, rows, rows_together
from stagescope.runfolder.run import Run

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
    """Return the figures of *columns* (ns) of *table*, which has *count* rows, at least one.

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


def client_side(client: ir.Table, run: Run) -> tuple[Client, int]:
    """Return the client's figures, and how many requests failed before a byte was sent.

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
    counted = answered - profiled
    latency, service = _latencies(timed, counted) if counted > 0 else (None, None)
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
    """Return the answers that came within the measured phase, per second of it.

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
    """Return counts by *key*, the most frequent first."""
    sums: dict[str, int] = {}
    for row in outcomes:
        if row["answered"] == answered:
            sums[row[key]] = sums.get(row[key], 0) + int(row["n"])
    return dict(sorted(sums.items(), key=lambda item: (-item[1], item[0])))


def _latencies(answered: ir.Table, count: int) -> tuple[Latency, Latency]:
    t = answered.select(
        intended=answered.last_byte_ns - answered.intended_ns,
        sent=answered.last_byte_ns - answered.sent_ns,
    )
    bounds = [ranks(count, quantile) for quantile in QUANTILES]
    # By method 7 the value of rank k is the quantile k / (n - 1).
    wanted = [rank / (count - 1) for pair in bounds if pair for rank in pair]
    asked: dict[str, ir.Value] = {}
    for name in t.columns:
        if wanted:
            asked[f"{name}_bounds"] = t[name].quantile(wanted)
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
            *_intervals(bounds, row.get(f"{name}_bounds", [])),
        )
        for name in t.columns
    )
    return latency, service


def _intervals(
    bounds: Sequence[tuple[int, int] | None], found_ns: Sequence[float]
) -> Iterator[tuple[float, float] | None]:
    values = iter(found_ns)
    for pair in bounds:
        yield (next(values) / 1e6, next(values) / 1e6) if pair else None


def batch_figures(tables: RunTables, since_ns: int | None) -> Batches:
    """Return the figures of batches that started at *since_ns* or later; of all where it is None.

    *since_ns* is on the batches' own clock. Batches of profiled requests are left out.
    """
    batches = _unprofiled(tables)
    kept = batches if since_ns is None else batches.filter(batches.start_ns >= since_ns)
    (sizes,) = rows(
        kept.aggregate(
            count=kept.count(),
            failed=(kept.error.fill_null("") != "").sum(),
            mean=kept["size"].mean(),
            p50=kept["size"].quantile(0.5),
            max=kept["size"].max(),
        )
    )
    spent = _stage_sums(kept)
    count = int(sizes["count"])
    return Batches(
        count=count,
        failed=int(sizes["failed"] or 0),
        mean_size=float(sizes["mean"] or 0),
        p50_size=float(sizes["p50"] or 0),
        max_size=int(sizes["max"] or 0),
        mean_wait_ms=spent["wait"] / max(count, 1) / 1e6,
        mean_collate_ms=spent["collate"] / max(count, 1) / 1e6,
        mean_inference_ms=spent["inference"] / max(count, 1) / 1e6,
        warmup_included=since_ns is None,
    )


def _unprofiled(tables: RunTables) -> ir.Table:
    server = tables.server
    profiled = server.filter(server.profiled.fill_null(False))
    ids = profiled.select(batch_id=profiled.batch_ids.unnest()).distinct()
    return cast(ir.Table, tables.batches.anti_join(ids, "batch_id"))


def _stage_sums(batches: ir.Table) -> dict[str, int]:
    span = batches.select(span=batches.stages.unnest()).span
    flat = span.as_table().select(name=span["stage"], self_ns=span["self_ns"])
    wanted: dict[str, Any] = {
        "wait": flat.name.isin(["batch", "batch.wait"]),
        "collate": flat.name == "batch.collate",
        "inference": (flat.name == "inference") | flat.name.startswith("inference."),
    }
    (row,) = rows(
        flat.aggregate(
            **{name: ibis.ifelse(is_it, flat.self_ns, 0).sum() for name, is_it in wanted.items()}
        )
    )
    return {name: int(value or 0) for name, value in row.items()}


MIN_ANSWERED = 100
"""With fewer, not one request lies beyond the 99th percentile."""

MAX_UNMATCHED = 0.01


def invalid_reasons(
    run: Run, client: Client, unmatched: Unmatched, instrument: Instrument
) -> tuple[str, ...]:
    """Return what the load driver found against the run, then what the records show."""
    found = (
        _too_few(client),
        _unmatched(run, client, unmatched),
        _lost("overwrote", instrument.overwritten),
        _lost("dropped", instrument.dropped),
    )
    return (*run.invalid_reasons, *(reason for reason in found if reason))


def _too_few(client: Client) -> str:
    counted = client.answered - client.profiled
    if counted >= MIN_ANSWERED:
        return ""
    profiled = " without being profiled" if client.profiled else ""
    return (
        f"only {counted:,} requests were answered{profiled}: "
        f"a 99th percentile needs {MIN_ANSWERED} at least"
    )


def _unmatched(run: Run, client: Client, unmatched: Unmatched) -> str:
    if run.server_source == "none" or not client.count:
        return ""
    lost = unmatched.client.answered + unmatched.server
    share = lost / client.count
    if share <= MAX_UNMATCHED:
        return ""
    return (
        f"{share:.1%} of the records met no partner: {unmatched.client.answered:,} answered "
        f"requests have no server record, {unmatched.server:,} server records no request"
    )


def _lost(what: str, count: int | None) -> str:
    return f"the server side {what} {count:,} records" if count else ""
