"""The evidence of one run: its report's figures, and what its tables tell beyond them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ibis.expr.types as ir
import numpy as np
import numpy.typing as npt

from stagescope.analysis.report import Part, Report
from stagescope.analysis.resources.model import StageUse
from stagescope.analysis.sources import RunTables, rows
from stagescope.analysis.verdict.machine import gpu_facts, host_facts
from stagescope.analysis.verdict.model import Evidence, GroupFacts, StageFacts, WaitFacts
from stagescope.analysis.verdict.work import StageWork, Work, crowd, forming_ms, union, work
from stagescope.analysis.waits.build import RunWaits
from stagescope.stages import OTHER

Floats = npt.NDArray[np.float64]
Strings = npt.NDArray[np.object_]

OUTSIDE = ("client_wait", "connect", "network", "other", "unexplained")
"""Parts that are no stage of the server."""
LEAST_OF_GROUP = 0.05
"""Of the requests: a rarer route tells nothing of the run."""
LEAST_REQUESTS = 30
BEGIN = 20
"""The run's begin is looked at in twentieths of its requests."""


class Requests:
    """The requests of the breakdown, in the order in which they were meant to be sent."""

    def __init__(self, tables: RunTables, base: ir.Table | None) -> None:
        # Columns, not rows: of a long run a dict a request would be most of the report's memory.
        ordered = None if base is None else _columns(tables, base).order_by("intended_ns", "seq")
        self._table: Any = None if ordered is None else ordered.to_pyarrow()

    def numbers(self, name: str) -> Floats:
        """Return one column; what is null is 0."""
        if self._table is None:
            return np.array([], dtype=np.float64)
        return np.asarray(self._table[name].fill_null(0).to_numpy(), dtype=np.float64)

    def values(self, name: str) -> list[Any]:
        """Return one column as it is."""
        return [] if self._table is None else self._table[name].to_pylist()

    def row(self, index: int) -> Mapping[str, Any]:
        """Return all of one request."""
        return {name: self._table[name][index].as_py() for name in self._table.column_names}


def _columns(tables: RunTables, base: ir.Table) -> ir.Table:
    """Join what the verdict needs of both sides to the breakdown's rows."""
    c, s = tables.client, tables.server
    client = c.select(
        "intended_ns", "request_bytes", "response_bytes", "chunks", "streamed", "status",
        client_seq=c.seq, client_trace_id=c.trace_id,
    )  # fmt: skip
    server = s.select(
        "route", "path", "ring_id", "send_wait_ns", "batch_ids", "duration_ns",
        span=s.span_id, trace=s.trace_id, served_seq=s.seq,
    )  # fmt: skip
    here = base.select("seq", "latency_ns", "server_span_id")
    both = here.inner_join(client, here.seq == client.client_seq)
    # By the trace too: what came by `Server-Timing` has no span of its own.
    joined = both.left_join(
        server, [both.server_span_id == server.span, both.client_trace_id == server.trace]
    )
    return joined.select(
        "seq", "latency_ns", "server_span_id", "intended_ns", "request_bytes", "response_bytes",
        "chunks", "streamed", "status", "client_trace_id", "route", "path", "ring_id",
        "send_wait_ns", "batch_ids", "duration_ns", "served_seq",
    )  # fmt: skip


def gather(tables: RunTables, report: Report, requests: Requests, waits: RunWaits) -> Evidence:
    """Return the evidence of the run in *tables*, whose *report* lacks only its verdict."""
    done = work(waits.served, waits.found) if report.waits or waits.found else None
    latency = requests.numbers("latency_ns") / 1e6
    slowest_ms = _slowest(latency)
    client, join, run = report.client, report.join, report.run
    total = report.total
    cold_ms, cold_requests = _cold(latency)
    at_work = _batches_at_work(tables)
    # Of each request, for how long it waited for its batch while no batch was at work.
    formed = forming_ms(waits.served, at_work) if waits.served and at_work else []
    forming = np.array(formed, dtype=np.float64)
    size_of, sizes = _sizes(requests, latency)
    return Evidence(
        valid=report.valid,
        invalid_reasons=report.invalid_reasons,
        source=join.source,
        requests=join.requests,
        answered=client.answered,
        failed=client.failed,
        bad_status=client.status.get("5xx", 0),
        rejected=client.rejected,
        asked_per_s=client.asked_rate_per_s,
        achieved_per_s=client.achieved_rate_per_s,
        seconds=run.measured_s,
        overloaded=client.overloaded,
        in_flight_middle=client.in_flight_middle,
        in_flight_end=client.in_flight_end,
        mean_ms=total.mean_ms if total else 0.0,
        p50_ms=total.p50_ms if total else 0.0,
        p99_ms=total.p99_ms if total else 0.0,
        slowest_ms=slowest_ms,
        parts={
            part.name: _own(part)
            for outer in report.parts
            if outer.name in OUTSIDE
            for part in (outer, *outer.inner)
        },
        stages=tuple(_stages(report, done, slowest_ms)),
        waits=tuple(_waits(report, slowest_ms)),
        one_clock=bool(join.requests) and join.one_clock == join.requests,
        loop_busy=done.loop_busy if done else None,
        loop_starved=done.loop_starved if done else 0.0,
        threads_busy=done.threads_busy if done else None,
        threads_max=done.threads_max if done else None,
        threads_computing=done.threads_computing if done else None,
        gc_share=done.gc_share if done else None,
        send_wait_ms=_mean(requests.numbers("send_wait_ns") / 1e6) if join.requests else None,
        batch_size=report.batches.mean_size,
        batch_max=report.batches.max_size,
        batches=report.batches.count,
        forming_ms=_mean(forming),
        forming_p50_ms=float(np.median(forming)) if len(forming) else 0.0,
        forming_slowest_ms=_slowest(forming),
        batch_busy=_batch_busy(at_work),
        host=host_facts(tables, report),
        gpu=gpu_facts(report),
        driver_late_p99_ms=run.driver.get("late_p99_ms"),
        driver_cpu_share=run.driver.get("cpu_share"),
        instrument_us=report.instrument.cost_us,
        collectors_core_share=sum(
            one.core_share for one in (report.resources.collectors if report.resources else ())
        ),
        cold_ms=cold_ms,
        cold_requests=cold_requests,
        routes=_routes(requests, latency),
        sizes=sizes,
        size_of=size_of,
        died=sum(report.died.values()),
        errors=client.errors,
        response_bytes=_mean(requests.numbers("response_bytes")),
    )


def _own(part: Part) -> float:
    return part.mean_ms if part.own is None else part.own.mean_ms


def _mean(values: Floats) -> float:
    return float(values.mean()) if len(values) else 0.0


def _slowest(latency: Floats) -> float:
    if not len(latency):
        return 0.0
    return float(np.sort(latency)[-max(1, len(latency) // 100) :].mean())


def _waits(report: Report, slowest_ms: float) -> Iterator[WaitFacts]:
    for wait in report.waits:
        known = [holder for holder in wait.held_by if holder.stage]
        by_stage: dict[str, float] = {}
        for holder in known:
            by_stage[holder.stage] = by_stage.get(holder.stage, 0.0) + holder.share
        most = max(by_stage, key=lambda name: by_stage[name], default="")
        yield WaitFacts(
            cause=wait.cause,
            mean_ms=wait.mean_ms,
            p50_ms=wait.p50_ms,
            p99_ms=wait.p99_ms,
            slowest_ms=wait.share_slowest * slowest_ms,
            low_ms=wait.low_ms,
            high_ms=wait.high_ms,
            holder=most,
            holder_share=by_stage.get(most, 0.0),
            where=next((holder.where for holder in known if holder.stage == most), ""),
        )


def _stages(report: Report, done: Work | None, slowest_ms: float) -> Iterator[StageFacts]:
    uses = {use.stage: use for use in (report.resources.stages if report.resources else ())}
    inner_uses = {use.stage: use for outer in uses.values() for use in outer.sub_stages}
    other = report.part(OTHER)
    for part in (*report.stages, *((other,) if other and report.stages else ())):
        if part.recorded:
            done_in = done.stages.get(part.name) if done else None
            inner = tuple(
                _stage(one, inner_uses.get(one.name), None, 0, slowest_ms)
                for one in part.inner
                if one.recorded
            )
            yield _stage(
                part, uses.get(part.name), done_in, done.requests if done else 0, slowest_ms, inner
            )


def _stage(
    part: Part,
    use: StageUse | None,
    done: StageWork | None,
    requests: int,
    slowest_ms: float,
    inner: tuple[StageFacts, ...] = (),
) -> StageFacts:
    own = part.own
    seen = crowd(done.visits) if done else None
    return StageFacts(
        name=part.name,
        mean_ms=part.mean_ms,
        own_ms=_own(part),
        own_p50_ms=part.p50_ms if own is None else own.p50_ms,
        own_p99_ms=part.p99_ms if own is None else own.p99_ms,
        own_slowest_ms=(part.share_slowest if own is None else own.share_slowest) * slowest_ms,
        waits_ms={} if own is None else own.waits,
        loop_ms=done.loop_ns / requests / 1e6 if done else None,
        thread_ms=done.thread_ns / requests / 1e6 if done else None,
        computed_ms=(done.loop_ns + done.thread_ns - done.off_ns) / requests / 1e6
        if done
        else None,
        alone_ms=seen.alone_ms if seen else None,
        few_ms=seen.few_ms if seen else None,
        per_other_ms=seen.per_other_ms if seen else None,
        others=seen.others if seen else None,
        open_max=seen.open_max if seen else None,
        where=_line(use),
        inner=inner,
    )


def _line(use: StageUse | None) -> str:
    """Return the line that was seen most in a stage, one that computed before one that waited."""
    frames = [stack.frame for stack in use.stacks] if use else []
    return frames[0] if frames else ""


def _batches_at_work(tables: RunTables) -> list[tuple[int, int]]:
    """Return from when to when each batch was at work: formed, and not done yet."""
    busy = []
    for row in rows(tables.batches.select("start_ns", "duration_ns", "stages")):
        waited = [span["end_ns"] for span in row["stages"] or () if span["stage"] == "batch.wait"]
        begin = row["start_ns"] + max(waited, default=0)
        busy.append((begin, row["start_ns"] + row["duration_ns"]))
    return busy


def _batch_busy(busy: Sequence[tuple[int, int]]) -> float | None:
    """Return for which share of the time from the first batch to the last one some were at work."""
    if not busy:
        return None
    whole = max(end for _, end in busy) - min(begin for begin, _ in busy)
    return union(busy) / whole if whole > 0 else None


def _cold(latency: Floats) -> tuple[float | None, int]:
    """Return the mean of the run's begin and its requests, where the rest is far faster.

    The begin lasts until a twentieth of the requests is no longer twice as slow as the later half
    at its median.
    """
    count = len(latency)
    if count < LEAST_REQUESTS:
        return None, 0
    later = latency[count // 2 :]
    usual = float(np.median(later))
    parts = np.array_split(np.arange(count), min(BEGIN, count // 5))
    cold = 0
    for part in parts:
        if float(np.median(latency[part])) <= 2 * usual + 1.0:
            break
        cold = int(part[-1]) + 1
    if not cold:
        # One request, or a few, may have paid for all.
        first = latency[: max(1, count // 100)]
        if float(first.max()) > 5 * float(np.quantile(later, 0.99)):
            return float(first.max()), 1
        return None, 0
    return float(latency[:cold].mean()), cold


def _routes(requests: Requests, latency: Floats) -> tuple[GroupFacts, ...]:
    both = zip(requests.values("route"), requests.values("path"), strict=True)
    names = np.array([route or path or "" for route, path in both], dtype=object)
    found = []
    for name in dict.fromkeys(names):
        inside = names == name
        if name and inside.mean() >= LEAST_OF_GROUP:
            found.append(GroupFacts(str(name), int(inside.sum()), float(latency[inside].mean())))
    return tuple(sorted(found, key=lambda group: -group.mean_ms))


def _sizes(requests: Requests, latency: Floats) -> tuple[str, tuple[GroupFacts, ...]]:
    """Return by which size latency goes most, and the thirds of the requests by it."""
    best, chosen = 0.0, ""
    columns = {"request": "request_bytes", "response": "response_bytes", "tokens": "chunks"}
    for name, column in columns.items():
        sizes = requests.numbers(column)
        if len(sizes) < LEAST_REQUESTS or np.quantile(sizes, 0.9) < 1.5 * np.quantile(sizes, 0.1):
            continue
        if name == "tokens" and not any(requests.values("streamed")):
            continue
        found = _rank_correlation(sizes, latency)
        if found > best:
            best, chosen = found, name
    if best < LEAST_CORRELATION:
        return "", ()
    sizes = requests.numbers(columns[chosen])
    low, high = np.quantile(sizes, (1 / 3, 2 / 3))
    groups = (
        ("small", sizes <= low), ("middle", (sizes > low) & (sizes <= high)), ("large", sizes > high),
    )  # fmt: skip
    return chosen, tuple(
        GroupFacts(name, int(inside.sum()), float(latency[inside].mean()))
        for name, inside in groups
        if inside.any()
    )


LEAST_CORRELATION = 0.5
"""Of ranks: below it a size explains less than a quarter of the latencies' order."""


def _rank_correlation(left: Floats, right: Floats) -> float:
    """Return Spearman's coefficient; ties have the mean of their ranks."""
    a, b = _ranks(left), _ranks(right)
    a, b = a - a.mean(), b - b.mean()
    scale = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / scale if scale else 0.0


def _ranks(values: Floats) -> Floats:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2)[inverse]
    return ranks
