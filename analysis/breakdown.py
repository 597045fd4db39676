"""Client latency as a partition: every nanosecond of it is in exactly one part.

Latency runs from the moment that the plan said to send until the last byte had come, so waiting
for a late driver is in it (no coordinated omission). Parts, in order: client wait, connect,
network, the six stages, stages of the user's own names, other, unexplained.

No part but `unexplained` is ever negative. What the clocks say beyond that (a server that stamps
its end after the client has the last byte, for one) is cut from `respond` first, and what is then
left is in `unexplained`; docs/report.md says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.join import Spans
from stagescope.stages import OTHER, STAGES

UNKNOWN = "server (unknown)"
"""Service time of requests without a server record: network and server together."""


@dataclass(frozen=True, slots=True)
class Slot:
    """One part of the partition: its name, its column, and the parts inside it."""

    name: str
    column: str
    inner: tuple[Slot, ...] = ()


def slots(spans: Spans, *, split_network: bool) -> tuple[Slot, ...]:
    """Return the parts in order; *split_network* where one clock serves both sides."""
    sides = (
        Slot("network.request", "network_request"),
        Slot("network.response", "network_response"),
    )
    return (
        Slot("client_wait", "client_wait"),
        Slot("connect", "connect"),
        Slot("network", "network", sides if split_network else ()),
        *stage_slots(spans),
        Slot(OTHER, "other"),
        Slot("unexplained", "unexplained"),
    )


def stage_slots(spans: Spans) -> tuple[Slot, ...]:
    """Return the stages: the six, then those with names of the user's own."""
    custom = spans.custom()
    columns = dict(zip(custom, (f"custom_{index}" for index in range(len(custom))), strict=True))
    return tuple(
        Slot(
            stage,
            columns.get(stage, stage),
            tuple(Slot(found.name, found.column) for found in spans.of(stage)),
        )
        for stage in (*STAGES, *custom)
    )


def unknown_slots() -> tuple[Slot, ...]:
    """Return the parts of a run that has no server side."""
    return (
        Slot("client_wait", "client_wait"),
        Slot("connect", "connect"),
        Slot(UNKNOWN, "server"),
        Slot("unexplained", "unexplained"),
    )


def split(pairs: ir.Table, spans: Spans) -> ir.Table:
    """Return the pairs with a column a part, in nanoseconds, and `after_ns`, the server's overhang.

    The columns of `slots` sum to `latency_ns` in every row, to the nanosecond.
    """
    client = _client_parts(pairs)
    network = _network(client)
    stages = _stages(network, spans)
    parts = [slot.column for slot in slots(spans, split_network=False)][:-1]
    explained = reduce(add, (stages[column] for column in parts))
    inner = [slot.column for slot in _inner(stage_slots(spans))]
    return stages.select(
        "seq",
        "latency_ns",
        "measured",
        "answered",
        "unsent",
        "profiled",
        "one_clock",
        "timing",
        "server_span_id",
        "sent_ns",
        *parts,
        *inner,
        "network_request",
        "network_response",
        "after_ns",
        server_ns=stages.duration_ns,
        by_parent=(stages.parent_span_id == stages.client_span_id).fill_null(False),
        same_status=(stages.status == stages.client_status).fill_null(False),
        unexplained=stages.latency_ns - explained,
    )


def split_unknown(client: ir.Table) -> ir.Table:
    """Return client rows with the parts of `unknown_slots`."""
    parts = _client_parts(client).mutate(server=_not_negative(ibis._.last_byte_ns - ibis._.sent_ns))
    known = parts.client_wait + parts.connect + parts.server
    return cast(ir.Table, parts.mutate(unexplained=parts.latency_ns - known))


def _client_parts(t: ir.Table) -> ir.Table:
    """Add latency and the client's own parts; from connected to sent is the client's wait too."""
    before = _not_negative(t.started_ns - t.intended_ns)
    writing = _not_negative(t.sent_ns - t.connected_ns)
    return cast(
        ir.Table,
        t.mutate(
            latency_ns=t.last_byte_ns - t.intended_ns,
            client_wait=before + writing,
            connect=_not_negative(t.connected_ns - t.started_ns),
        ),
    )


def _network(t: ir.Table) -> ir.Table:
    """Add the network, its two sides, and how long the server went on after the last byte."""
    end = t.start_ns + t.duration_ns
    request = ibis.ifelse(t.one_clock, _not_negative(t.start_ns - t.sent_ns), 0)
    response = ibis.ifelse(t.one_clock, _not_negative(t.last_byte_ns - end), 0)
    rest = t.last_byte_ns - t.sent_ns - t.duration_ns
    return cast(
        ir.Table,
        t.mutate(
            network=ibis.ifelse(t.one_clock, request + response, _not_negative(rest)),
            network_request=request,
            network_response=response,
            after_ns=ibis.ifelse(
                t.one_clock, _not_negative(end - t.last_byte_ns), _not_negative(-rest)
            ),
        ),
    )


def _stages(t: ir.Table, spans: Spans) -> ir.Table:
    """Add a column a stage: `respond` less the overhang, `other` less the user's own stages."""
    custom = {
        slot.column: reduce(
            add, (t[found.column] for found in spans.names if found.stage == slot.name)
        )
        for slot in stage_slots(spans)
        if slot.name not in STAGES
    }
    plain = {stage: t[f"{stage}_ns"] for stage in STAGES if stage != "respond"}
    respond = _not_negative(t.respond_ns - t.after_ns)
    other = _not_negative(reduce(lambda left, own: left - own, custom.values(), t.other_ns))
    charged = t.mutate(**plain, **custom, respond=respond, other=other)
    return _cut_inner(charged, [found.column for found in spans.of("respond")])


def _cut_inner(t: ir.Table, columns: Sequence[str]) -> ir.Table:
    """Keep the sub-stages of `respond` within what the cut has left of it, the last cut first."""
    left = t.respond
    cut: dict[str, ir.Value] = {}
    for column in columns:
        cut[column] = ibis.least(t[column], left)
        left = left - cut[column]
    return cast(ir.Table, t.mutate(**cut)) if cut else t


def _inner(outer: Sequence[Slot]) -> list[Slot]:
    return [slot for stage in outer for slot in stage.inner]


def _not_negative(value: ir.Value) -> ir.IntegerValue:
    return cast(ir.IntegerValue, ibis.greatest(value, 0))
