"""The server's side of a run folder: records in, rows of `server` and `batches` out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stagescope.errors import StagescopeError
from stagescope.exporters.parquet import TableFile
from stagescope.records import BatchRecord, InstrumentCost, Record, RequestRecord
from stagescope.stages import STAGES, StageSpan
from stagescope.tables import BATCHES, SERVER


@dataclass(slots=True)
class ServerSide:
    """What was written, counted on the way."""

    requests: int = 0
    batches: int = 0
    costs: dict[str, InstrumentCost] = field(default_factory=dict[str, InstrumentCost])
    """By ring id: what the middleware measured of itself in each served process."""
    since_ns: int = 0
    """When the first request began, monotonic; 0 where there was none."""
    until_ns: int = 0
    """When the last one ended."""

    def note_request(self, record: RequestRecord) -> None:
        """Count *record*, and the time that it took up."""
        self.requests += 1
        self.since_ns = min(self.since_ns or record.start_ns, record.start_ns)
        self.until_ns = max(self.until_ns, record.start_ns + record.duration_ns)


def write_records(
    folder: Path,
    records: Iterable[Record],
    *,
    broken: Callable[[StagescopeError], None] | None = None,
) -> ServerSide:
    """Write `server.parquet` and `batches.parquet` of *folder* from *records*, as they come.

    Where *records* itself fails in the middle and *broken* is given, *broken* is told and what
    had come is kept. Raises StagescopeError where a file cannot be written.
    """
    side = ServerSide()
    with ExitStack() as files:
        server = files.enter_context(TableFile(folder, SERVER))
        batches = files.enter_context(TableFile(folder, BATCHES))
        for record in _until_broken(records, broken):
            side.costs[record.process.ring_id] = record.process.cost
            if isinstance(record, RequestRecord):
                server.append(server_row(record))
                side.note_request(record)
            elif isinstance(record, BatchRecord):
                batches.append(batch_row(record))
                side.batches += 1
    return side


def write_rows(folder: Path, rows: Iterable[Mapping[str, Any]]) -> ServerSide:
    """Write `server.parquet` from ready *rows* and a `batches.parquet` without any."""
    with TableFile(folder, BATCHES), TableFile(folder, SERVER) as server:
        server.extend(rows)
    return ServerSide(requests=server.rows)


def _until_broken(
    records: Iterable[Record], broken: Callable[[StagescopeError], None] | None
) -> Iterable[Record]:
    source = iter(records)
    while True:
        try:
            record = next(source)
        except StopIteration:
            return
        except StagescopeError as problem:
            if broken is None:
                raise
            broken(problem)
            return
        yield record


def server_row(record: RequestRecord) -> dict[str, Any]:
    """Give *record* as a row of the `server` table."""
    spent = record.stage_ns()
    charged = {f"{stage}_ns": spent.get(stage, 0) for stage in STAGES}
    process = record.process
    return {
        "trace_id": record.trace_id,
        "span_id": record.span_id,
        "parent_span_id": record.parent_span_id,
        "ring_id": process.ring_id,
        "seq": record.seq,
        "pid": process.pid,
        "service": process.service,
        "host": process.host,
        "boot_id": process.boot_id,
        "state": record.state.value,
        "start_ns": record.start_ns,
        "start_wall_ns": process.anchor.wall(record.start_ns),
        "duration_ns": record.duration_ns,
        **charged,
        "other_ns": record.duration_ns - sum(charged.values()),
        "stages": [_span(span) for span in record.stages],
        "batch_ids": list(record.batch_ids),
        "method": record.method,
        "path": record.path,
        "route": record.route,
        "status": record.status,
        "error": record.error,
        "request_bytes": record.request_bytes,
        "response_bytes": record.response_bytes,
        "first_byte_ns": record.first_byte_ns,
        "send_wait_ns": record.send_wait_ns,
        "chunks": record.chunks,
        "stages_dropped": record.stages_dropped,
        "chunk_gaps": record.chunk_gaps,
        "chunk_gap_sum_ns": record.chunk_gap_sum_ns,
        "chunk_gap_max_ns": record.chunk_gap_max_ns,
        "stalls": [
            {"stage": stall.stage, "cause": stall.cause, "stall_ns": stall.stall_ns}
            for stall in record.stalls
        ],
        "profiled": record.profiled,
        "source": "agent",
    }


def batch_row(record: BatchRecord) -> dict[str, Any]:
    """Give *record* as a row of the `batches` table."""
    return {
        "batch_id": record.batch_id,
        "trace_id": record.trace_id,
        "ring_id": record.process.ring_id,
        "seq": record.seq,
        "model": record.model,
        "state": record.state.value,
        "start_ns": record.start_ns,
        "duration_ns": record.duration_ns,
        "size": record.size,
        "members": [{"trace_id": m.trace_id, "span_id": m.span_id} for m in record.members],
        "device_ns": record.device_ns,
        "stages": [_span(span) for span in record.stages],
        "error": record.error,
    }


def _span(span: StageSpan) -> dict[str, Any]:
    return {
        "stage": span.stage,
        "start_ns": span.start_ns,
        "end_ns": span.end_ns,
        "self_ns": span.self_ns,
        "failed": span.failed,
    }
