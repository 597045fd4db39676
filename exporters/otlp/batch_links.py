"""Where a request and its batches refer to each other: on stages, never on the span of either.

Jaeger's page takes a span's first reference for its parent; a root that begins with a link to
another trace is dropped from its critical path, and all below it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from stagescope import semconv as names
from stagescope.records import BatchRecord, RequestRecord

MOST_LINKS: Final = 128
"""Of one span: what OpenTelemetry's SDKs and back ends keep by default."""
RUNS_IN: Final = "inference"
"""The stage, of a request as of a batch, in which a batch does its work."""


@dataclass(frozen=True, slots=True)
class BatchLink:
    """One batch of a request, as the request's stage tells of it."""

    trace_id: str
    span_id: str
    start_ns: int
    end_ns: int
    size: int
    model: str
    worker: int
    """Process id of who ran it."""
    position: int | None
    """Of the request in it, from 0; None where the batch had no room to name it."""


def batch_link(batch: BatchRecord, request: RequestRecord) -> BatchLink:
    """Return what *request* tells of *batch*, which it was a member of."""
    ids = [member.span_id for member in batch.members]
    return BatchLink(
        batch.trace_id, batch.batch_id, batch.start_ns, batch.start_ns + batch.duration_ns,
        batch.size, batch.model, batch.process.pid,
        ids.index(request.span_id) if request.span_id in ids else None,
    )  # fmt: skip


def has_trace(batch: BatchRecord | BatchLink) -> bool:
    """Return whether *batch* is a trace of its own: one of one says no more than its request."""
    return batch.size > 1


def attributes_of(link: BatchLink) -> dict[str, str | int]:
    """Return the attributes of the request's stage that ran in the batch."""
    told: dict[str, str | int] = {
        names.BATCH_SIZE: link.size,
        names.BATCH_WORKER: link.worker,
    }
    if link.model:
        told[names.MODEL] = link.model
    if link.position is not None:
        told[names.BATCH_POSITION] = link.position
    return told


def stage_in_batch(request: RequestRecord, link: BatchLink) -> int | None:
    """Return which opening of a stage of *request* ran in the batch; None where none did.

    Of those open during the batch it is the one for the model that shares most of it, and where
    there is none for the model, any that does. Where none was open meanwhile, by the clocks of two
    processes, it is the first for the model.
    """
    since, until = link.start_ns - request.start_ns, link.end_ns - request.start_ns
    best = next((n for n, one in enumerate(request.stages) if _for_the_model(one.stage)), None)
    best_rank = False, 0
    for index, stage in enumerate(request.stages):
        shared = min(stage.end_ns, until) - max(stage.start_ns, since)
        rank = _for_the_model(stage.stage), shared
        if shared > 0 and rank > best_rank:
            best, best_rank = index, rank
    return best


def _for_the_model(stage: str) -> bool:
    return stage.partition(".")[0] == RUNS_IN


def stage_with_members(batch: BatchRecord) -> int | None:
    """Return which opening of a stage of *batch* links to its first members; None: none does."""
    for index, stage in enumerate(batch.stages):
        if stage.stage == RUNS_IN:
            return index
    return None


def further_holders(batch: BatchRecord) -> int:
    """Return how many spans *batch* needs beside its stages to link to all its members."""
    here = MOST_LINKS if stage_with_members(batch) is not None else 0
    return -(-max(0, len(batch.members) - here) // MOST_LINKS)
