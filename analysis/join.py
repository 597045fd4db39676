"""Client rows beside server rows, by trace id.

Where a trace has several server records (a retry, two services behind one another), the one kept
is, in this order: whose parent is the client's span; whose status the client saw; the longest.
The others are counted, never added up.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.sources import RunTables, rows, stored
from stagescope.stages import OTHER, STAGES, stage_of

# The stage names that a run's requests really opened, beyond the six wide columns.
#
# A file has a column for each of the six stages; sub-stages and stages of the user's own names are
# in the list `server.stages`. That list is heavy, so it is read for the names that occur only.


MAX_NAMES = 64
"""Names with a row of their own, longest total time first; the rest stays with its stage."""


@dataclass(frozen=True, slots=True)
class SpanName:
    """A stage name found in the list, and the column that its time per request gets."""

    name: str
    column: str

    @property
    def stage(self) -> str:
        """The stage that it belongs to."""
        return stage_of(self.name)


@dataclass(frozen=True, slots=True)
class Spans:
    """What the `stages` lists hold, all requests together."""

    names: tuple[SpanName, ...]
    """In the order of the vocabulary; names of the user's own after it, by name."""
    count: int
    """Openings of a stage, the six included."""
    recorded: frozenset[str]
    """Stages that were opened at all, themselves or by a sub-stage."""

    def of(self, stage: str) -> tuple[SpanName, ...]:
        """Return the sub-stages of *stage*."""
        return tuple(found for found in self.names if found.stage == stage and found.name != stage)

    def custom(self) -> tuple[str, ...]:
        """Return the stages with names of the user's own."""
        own = (name.stage for name in self.names if name.stage not in (*STAGES, OTHER))
        return tuple(dict.fromkeys(own))


def find_spans(server: ir.Table, known: Sequence[str]) -> Spans:
    """Look which names occur in *server*; *known* names come first, in that order."""
    span = server.select(span=server.stages.unnest()).span
    flat = span.as_table().select(name=span["stage"], self_ns=span["self_ns"])
    found = rows(
        flat.group_by("name")
        .aggregate(total=flat.self_ns.sum(), openings=flat.count())
        .order_by(ibis.desc("total"), "name")
    )
    names = [row["name"] for row in found if row["name"] not in (*STAGES, OTHER)][:MAX_NAMES]
    rank = {name: index for index, name in enumerate(known)}
    names.sort(key=lambda name: (rank.get(name, len(rank)), name))
    return Spans(
        names=tuple(SpanName(name, f"span_{index}") for index, name in enumerate(names)),
        count=sum(row["openings"] for row in found),
        recorded=frozenset(stage_of(row["name"]) for row in found),
    )


def self_ns(server: ir.Table, name: str) -> ir.IntegerValue:
    """Return what each row of *server* was charged for spans called exactly *name*."""
    spans = cast(ir.ArrayValue, server.stages)
    charged = spans.map(lambda span: ibis.ifelse(span["stage"] == name, span["self_ns"], 0))
    # DuckDB sums int64 to int128, which Ibis takes for int64 and will not cast: hence by way of
    # float64, exact up to 104 days.
    return cast(ir.IntegerValue, charged.sums().fill_null(0).cast("float64").cast("int64"))


@dataclass(frozen=True, slots=True)
class Join:
    """How the two sides met, in counts of requests."""

    by: str
    """`trace_id+parent_span_id`, `trace_id`, `mixed` (both occur) or `none`."""
    joined: int
    """Measured requests that were answered, were not profiled and have a server record: the
    breakdown's base."""
    by_parent: int
    """Of those: the server's parent is the client's span."""
    one_clock: int
    """Of those: client and server share one monotonic clock."""
    server_timing: int
    """Of those: the server's side is from the `Server-Timing` header."""
    extra_server: int
    """Further server records of a trace that already has one."""
    server_without_client: int
    """Server records of this run whose trace no client row has."""
    matched: int
    """Measured client rows with a server record, answered or not."""
    unsent_matched: int
    """Of `matched`: the client's row says that nothing was sent."""


def pair(tables: RunTables, spans: Spans) -> ir.Table:
    """Return one row a server record, with its client row where there is one (`seq` null if not)."""
    client = client_columns(tables)
    server = _server_columns(tables, spans)
    return cast(
        ir.Table,
        server.left_join(client, server.trace_id == client.client_trace_id),
    )


def client_columns(tables: RunTables) -> ir.Table:
    """Return the client's rows with what the join and the breakdown need.

    `answered`: a whole response came, with any status. `unsent`: it failed before a byte was sent;
    the driver then leaves `sent_ns` out, or gives it the time of the failure. `profiled`: of its
    trace's server records one overlaps a capture.
    """
    c = _with_profiled(tables)
    failed = c.error.fill_null("") != ""
    started = c.started_ns.coalesce(c.intended_ns)
    connected = c.connected_ns.coalesce(started)
    sent = c.sent_ns.coalesce(connected)
    return cast(
        ir.Table,
        c.select(
            c.seq,
            c.intended_ns,
            c.last_byte_ns,
            started_ns=started,
            connected_ns=connected,
            sent_ns=sent,
            client_trace_id=c.trace_id,
            client_span_id=c.span_id,
            client_status=c.status,
            client_error=c.error,
            first_body_ns=c.first_body_ns,
            chunks=c.chunks,
            streamed=c.streamed.fill_null(False),
            profiled=c.profiled,
            measured=c.phase.fill_null("measure") == "measure",
            answered=~failed & (c.status > 0).fill_null(False),
            unsent=failed & ((c.sent_ns.fill_null(0) == 0) | (c.sent_ns >= c.last_byte_ns)),
        ),
    )


def in_breakdown(requests: ir.Table) -> ir.BooleanValue:
    """Return which of *requests* (client columns, or pairs) the figures are of."""
    return cast(ir.BooleanValue, requests.measured & requests.answered & ~requests.profiled)


def _with_profiled(tables: RunTables) -> ir.Table:
    """Return the client's table with a column `profiled`; runs without a capture need no join."""
    s = tables.server
    profiled = s.filter(s.profiled.fill_null(False)).select("trace_id").distinct()
    (found,) = rows(profiled.aggregate(n=profiled.count()))
    c = tables.client
    if not found["n"]:
        return cast(ir.Table, c.mutate(profiled=ibis.literal(False)))
    marks = stored(tables, profiled.select(profiled_trace_id="trace_id"))
    joined = c.left_join(marks, c.trace_id == marks.profiled_trace_id)
    return cast(ir.Table, joined.mutate(profiled=joined.profiled_trace_id.notnull()))


def _server_columns(tables: RunTables, spans: Spans) -> ir.Table:
    s = tables.server
    boot_id = tables.run.host.boot_id
    timing = s.source.fill_null("agent") == "server-timing"
    shared = (s.boot_id == boot_id).fill_null(False) & ibis.literal(boot_id != "")
    return cast(
        ir.Table,
        s.select(
            s.trace_id,
            s.parent_span_id,
            s.start_ns,
            s.duration_ns,
            server_span_id=s.span_id,
            status=s.status,
            timing=timing,
            one_clock=shared & ~timing & s.start_ns.notnull(),
            **{f"{stage}_ns": s[f"{stage}_ns"].fill_null(0) for stage in (*STAGES, "other")},
            **{found.column: self_ns(s, found.name) for found in spans.names},
        ),
    )


def choose(pairs: ir.Table, tables: RunTables) -> tuple[ir.Table, int]:
    """Leave one server record a client row; give those rows and how many records were left out.

    *pairs* is stored already, since it is read more than once.
    """
    matched = pairs.filter(pairs.seq.notnull())
    (counts,) = rows(matched.aggregate(rows=matched.count(), requests=matched.seq.nunique()))
    extra = int(counts["rows"] - counts["requests"])
    if not extra:
        return matched, 0
    per_request = matched.group_by("seq").aggregate(n=matched.count())
    doubled = stored(tables, per_request.filter(per_request.n > 1))
    several = matched.semi_join(doubled, "seq")
    order = ibis.window(
        group_by="seq",
        order_by=[
            ibis.desc("by_parent"),
            ibis.desc("same_status"),
            ibis.desc("server_ns"),
            "network",
        ],
    )
    ranked = several.mutate(rank=ibis.row_number().over(order))
    best = ranked.filter(ranked.rank == 0).drop("rank")
    return cast(ir.Table, matched.anti_join(doubled, "seq").union(best)), extra


def count(pairs: ir.Table, chosen: ir.Table, extra: int) -> Join:
    """Count how *pairs* met, and what is left after `choose`."""
    (lost,) = rows(pairs.aggregate(n=pairs.seq.isnull().sum()))
    base = in_breakdown(chosen)
    (n,) = rows(
        chosen.aggregate(
            joined=base.sum(),
            by_parent=(base & chosen.by_parent).sum(),
            one_clock=(base & chosen.one_clock).sum(),
            server_timing=(base & chosen.timing).sum(),
            matched=chosen.measured.sum(),
            unsent_matched=(chosen.measured & chosen.unsent).sum(),
        )
    )
    whole = {name: int(value or 0) for name, value in n.items()}
    return Join(
        by=_kind(whole),
        extra_server=extra,
        server_without_client=int(lost["n"] or 0),
        **whole,
    )


def _kind(n: dict[str, Any]) -> str:
    if not n["joined"]:
        return "none"
    if n["by_parent"] == n["joined"]:
        return "trace_id+parent_span_id"
    return "mixed" if n["by_parent"] else "trace_id"
