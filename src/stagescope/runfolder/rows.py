"""The server's side of a run folder: records in, rows of `server` and `batches` out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from stagescope.errors import StagescopeError
from stagescope.kernels import KernelRow
from stagescope.records import BatchRecord, InstrumentCost, Record, RequestRecord, State, last_stage
from stagescope.runfolder.parquet import TableFile
from stagescope.runfolder.schema import BATCHES, KERNELS, SAMPLES, SERVER, STACKS, Table
from stagescope.samples import SAMPLE_NAMES, Sample
from stagescope.stacks import Frame, StackSpan
from stagescope.stages import STAGES, StageSpan


@dataclass(slots=True)
class ServerSide:
    """What was written, counted on the way."""

    requests: int = 0
    batches: int = 0
    damaged: int = 0
    """Records that fit no row: their numbers are out of range."""
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
    side.damaged = server.damaged + batches.damaged
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
        "died_in_stage": last_stage(record) if record.state is State.DIED else "",
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
        "wait_facts": [fact._asdict() for fact in record.wait_facts],
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


_NAMED = {named.name: named for named in SAMPLE_NAMES}

T = TypeVar("T")


def write_samples(folder: Path, samples: Iterable[Sample]) -> int:
    """Write `samples.parquet` of *folder* and give its rows.

    Where *samples* itself fails in the middle, no file is left; that goes for all three.
    Raises StagescopeError where the file cannot be written.
    """
    return _write(folder, SAMPLES, samples, sample_row)


def write_stacks(folder: Path, stacks: Iterable[StackSpan]) -> int:
    """Write `stacks.parquet` of *folder* and give its rows."""
    return _write(folder, STACKS, stacks, stack_row)


def write_kernels(folder: Path, kernels: Iterable[KernelRow]) -> int:
    """Write `kernels.parquet` of *folder* and give its rows."""
    return _write(folder, KERNELS, kernels, kernel_row)


def _write(
    folder: Path, table: Table, items: Iterable[T], row: Callable[[T], dict[str, Any]]
) -> int:
    with TableFile(folder, table) as file:
        file.extend(map(row, items))
    return file.rows


def sample_row(sample: Sample) -> dict[str, Any]:
    """Give *sample* as a row; unit and kind of a name that only a newer agent knows are empty."""
    named = _NAMED.get(sample.name)
    return {
        "name": sample.name,
        "start_ns": sample.start_ns,
        "end_ns": sample.end_ns,
        "value": sample.value,
        "unit": named.unit if named else "",
        "kind": named.kind if named else "",
        "pid": sample.pid,
        "device": sample.device,
        "detail": sample.detail,
    }


def stack_row(stack: StackSpan) -> dict[str, Any]:
    """Give *stack* as a row."""
    return {
        "pid": stack.pid,
        "thread_id": stack.thread_id,
        "thread": _utf8(stack.thread),
        "start_ns": stack.start_ns,
        "end_ns": stack.end_ns,
        "samples": stack.samples,
        "stage": stack.stage,
        "by": stack.by,
        "running": stack.running,
        "frames": [_shown(frame) for frame in stack.frames],
        "reason": stack.reason,
        "how": stack.how,
        "cpu_ns": stack.cpu_ns,
    }


def kernel_row(kernel: KernelRow) -> dict[str, Any]:
    """Give *kernel* as a row: its fields are the table's columns."""
    return {column.name: getattr(kernel, column.name) for column in KERNELS.columns}


def _shown(frame: Frame) -> str:
    return _utf8(f"{frame.function} ({frame.file}:{frame.line})")


def _utf8(text: str) -> str:
    """Make text of a file's name that is none: Python holds its odd bytes as lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
