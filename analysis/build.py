"""From a run folder to its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import ibis.expr.types as ir

from stagescope.analysis.breakdown import (
    Slot,
    slots,
    split,
    split_unknown,
    stage_slots,
    unknown_slots,
)
from stagescope.analysis.client_view import in_flight, is_overloaded, rejections, token_latencies
from stagescope.analysis.join import (
    Join,
    Spans,
    choose,
    client_columns,
    count,
    find_spans,
    in_breakdown,
    pair,
)
from stagescope.analysis.report import (
    Client,
    Instrument,
    Joined,
    Part,
    Report,
    Unmatched,
    UnmatchedClient,
)
from stagescope.analysis.resources.build import stage_resources
from stagescope.analysis.resources.model import Resources
from stagescope.analysis.sources import RunTables, open_run, reading, rows, stored
from stagescope.analysis.statistics import (
    Figures,
    batch_figures,
    client_side,
    figures,
    invalid_reasons,
)
from stagescope.analysis.verdict.evidence import Requests, gather
from stagescope.analysis.verdict.judge import judge
from stagescope.analysis.verdict.tail import tail
from stagescope.analysis.waits.build import RunWaits, with_waits
from stagescope.records import State
from stagescope.runfolder.run import Run
from stagescope.stages import SUB_STAGES


def build_report(folder: Path, backend: Any = None) -> Report:
    """Read the run in *folder* and join, break down and judge it.

    *backend* is a connected Ibis backend; by default DuckDB in memory.
    Raises UsageError, which names the file and the cause, where the folder cannot be read.
    """
    tables = open_run(folder, backend)
    try:
        with reading(folder):
            return _build(tables)
    finally:
        if backend is None:
            tables.backend.disconnect()


def _build(tables: RunTables) -> Report:
    run = tables.run
    client = client_columns(tables)
    seen, unsent = _seen(client, tables)
    spans = find_spans(tables.server, SUB_STAGES)
    pairs = stored(tables, split(pair(tables, spans), spans))
    chosen, extra = choose(pairs, tables)
    join = count(pairs, chosen, extra)
    total, parts, stages = _parts(tables, client, chosen, spans, join, seen)
    unmatched = _unmatched(seen, join, unsent)
    instrument = _instrument(tables, chosen, spans)
    since = _measured_since(client, join)
    resources = stage_resources(tables, since)
    waits = _waits(tables, chosen, spans, join, total, parts, resources)
    names = {part.name for part in stages}
    report = Report(
        folder=tables.folder,
        run=run,
        invalid_reasons=invalid_reasons(run, seen, unmatched, instrument),
        client=seen,
        join=_joined(join, run.server_source),
        total=total,
        parts=waits.parts,
        stages=tuple(part for part in waits.parts if part.name in names),
        waits=waits.waits,
        held=waits.held,
        batches=batch_figures(tables, since),
        unmatched=unmatched,
        died=_died(tables.server),
        instrument=instrument,
        resources=resources,
    )
    base = chosen.filter(in_breakdown(chosen)) if join.joined else None
    return _judged(report, tables, Requests(tables, base), waits)


def _judged(report: Report, tables: RunTables, requests: Requests, waits: RunWaits) -> Report:
    """Return *report* with its evidence, its verdict and its slowest requests."""
    evidence = gather(tables, report, requests, waits)
    return replace(
        report,
        evidence=evidence,
        verdict=judge(evidence),
        tail=tail(evidence, requests, waits.served, waits.found),
    )


def _seen(client: ir.Table, tables: RunTables) -> tuple[Client, int]:
    """Return what the client saw, and how many requests failed before a byte was sent."""
    seen, unsent = client_side(client, tables.run)
    first_token, inter_token = token_latencies(client)
    middle, end = in_flight(client, tables.run)
    return replace(
        seen,
        rejected=rejections(client, tables),
        overloaded=is_overloaded(middle, end, seen.count),
        in_flight_middle=middle,
        in_flight_end=end,
        first_token=first_token,
        inter_token=inter_token,
    ), unsent


def _parts(
    tables: RunTables, client: ir.Table, chosen: ir.Table, spans: Spans, join: Join, seen: Client
) -> tuple[Part | None, tuple[Part, ...], tuple[Part, ...]]:
    """Return the total, all parts, and those parts that are stages."""
    if join.joined:
        base = chosen.filter(in_breakdown(chosen))
        order = slots(spans, split_network=join.one_clock == join.joined)
        requests = join.joined
    elif seen.latency is not None:
        base = stored(tables, split_unknown(client.filter(in_breakdown(client))))
        order = unknown_slots()
        requests = seen.answered - seen.profiled
    else:
        return None, (), ()
    columns = ["latency_ns", *_columns(order)]
    found = figures(tables, base, columns, requests)
    parts = tuple(_part(slot, found) for slot in order)
    if not join.joined:
        parts = tuple(_of_own_client(part, tables.run) for part in parts)
        return _part(Slot("client_latency", "latency_ns"), found), parts, ()
    names = {slot.name for slot in stage_slots(spans)}
    parts = tuple(
        replace(part, recorded=part.name in spans.recorded or part.mean_ms > 0)
        if part.name in names
        else _of_own_client(part, tables.run)
        for part in parts
    )
    stages = tuple(part for part in parts if part.name in names)
    return _part(Slot("client_latency", "latency_ns"), found), parts, stages


def _of_own_client(part: Part, run: Run) -> Part:
    """Mark as unknown what a client of one's own did not tell."""
    told = not run.client_file or part.name not in ("client_wait", "connect") or part.mean_ms > 0
    return part if told else replace(part, recorded=False)


def _waits(
    tables: RunTables,
    chosen: ir.Table,
    spans: Spans,
    join: Join,
    total: Part | None,
    parts: tuple[Part, ...],
    resources: Resources | None,
) -> RunWaits:
    if not join.joined or total is None:
        return RunWaits(parts)
    base = chosen.filter(in_breakdown(chosen))
    order = slots(spans, split_network=join.one_clock == join.joined)
    return with_waits(tables, base, order, parts, total, join.joined, resources)


def _columns(order: Sequence[Slot]) -> list[str]:
    """Return the columns of *order*, each once: a stage may be its own only sub-stage."""
    every = (each.column for slot in order for each in (slot, *slot.inner))
    return list(dict.fromkeys(every))


def _part(slot: Slot, found: Mapping[str, Figures]) -> Part:
    own, total = found[slot.column], found["latency_ns"]
    return Part(
        name=slot.name,
        mean_ms=own.mean_ms,
        p50_ms=own.p50_ms,
        p95_ms=own.p95_ms,
        p99_ms=own.p99_ms,
        share=own.mean_ms / total.mean_ms if total.mean_ms else 0.0,
        share_slowest=own.slowest_ms / total.slowest_ms if total.slowest_ms else 0.0,
        inner=tuple(_part(each, found) for each in slot.inner),
    )


def _joined(join: Join, source: str) -> Joined:
    return Joined(
        by=join.by,
        requests=join.joined,
        by_parent=join.by_parent,
        one_clock=join.one_clock,
        server_timing=join.server_timing,
        extra_server=join.extra_server,
        source=source,
    )


def _unmatched(seen: Client, join: Join, unsent: int) -> Unmatched:
    before = unsent - join.unsent_matched
    total = seen.count - join.matched - seen.rejected
    answered = seen.answered - seen.profiled - join.joined - seen.rejected
    return Unmatched(
        client=UnmatchedClient(
            total=total,
            before_server=before,
            failed=total - before - answered,
            answered=answered,
        ),
        server=join.server_without_client,
    )


def _died(server: ir.Table) -> dict[str, int]:
    """Return the requests whose process died, by the stage it died in, the most first."""
    dead = server.filter(server.state == State.DIED.value)
    found = rows(dead.group_by("died_in_stage").aggregate(requests=dead.count()))
    # A folder written before there was this column does not know.
    stages = {row["died_in_stage"] or "unknown": int(row["requests"]) for row in found}
    return dict(sorted(stages.items(), key=lambda item: (-item[1], item[0])))


def _instrument(tables: RunTables, chosen: ir.Table, spans: Spans) -> Instrument:
    s = tables.server
    (server,) = rows(s.aggregate(n=s.count(), dropped=s.stages_dropped.sum()))
    base = chosen.filter(in_breakdown(chosen))
    (after,) = rows(base.aggregate(mean=base.after_ns.mean()))
    said = tables.run.instrument
    dropped = [value for name, value in said.items() if "dropped" in name]
    openings = spans.count / server["n"] if server["n"] else 0.0
    return Instrument(
        cost_us=said["request_us"] + openings * said["stage_us"] if "stage_us" in said else None,
        stages_per_request=openings,
        dropped=int(sum(dropped)) if dropped else None,
        overwritten=int(said["overwritten"]) if "overwritten" in said else None,
        stages_dropped=int(server["dropped"] or 0),
        server_after_ms=float(after["mean"] or 0.0) / 1e6,
    )


def _measured_since(client: ir.Table, join: Join) -> int | None:
    """Return when the measured phase began, where the server's clock is the client's; else None."""
    if not join.joined or join.one_clock < join.joined:
        return None
    measured = client.filter(client.measured)
    (row,) = rows(measured.aggregate(since=measured.intended_ns.min()))
    return int(row["since"])
