"""The stage names that a run's requests really opened, beyond the six wide columns.

A file has a column for each of the six stages; sub-stages and stages of the user's own names are
in the list `server.stages`. That list is heavy, so it is read for the names that occur only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.sources import rows
from stagescope.stages import OTHER, STAGES, stage_of

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

    def of(self, stage: str) -> tuple[SpanName, ...]:
        """Give the sub-stages of *stage*."""
        return tuple(found for found in self.names if found.stage == stage and found.name != stage)

    def custom(self) -> tuple[str, ...]:
        """Give the stages with names of the user's own."""
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
    )


def self_ns(server: ir.Table, name: str) -> ir.IntegerValue:
    """Give what each row of *server* was charged for spans called exactly *name*."""
    spans = cast(ir.ArrayValue, server.stages)
    charged = spans.map(lambda span: ibis.ifelse(span["stage"] == name, span["self_ns"], 0))
    # DuckDB sums int64 to int128, which Ibis takes for int64 and will not cast: hence by way of
    # float64, exact up to 104 days.
    return cast(ir.IntegerValue, charged.sums().fill_null(0).cast("float64").cast("int64"))
