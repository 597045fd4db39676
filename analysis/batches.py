"""The run's batches: sizes, and what a batch waited, collated and computed."""

from __future__ import annotations

from typing import Any, cast

import ibis
import ibis.expr.types as ir

from stagescope.analysis.report import Batches
from stagescope.analysis.sources import RunTables, rows


def batch_figures(tables: RunTables, since_ns: int | None) -> Batches:
    """Give the figures of batches that started at *since_ns* or later; of all where it is None.

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
