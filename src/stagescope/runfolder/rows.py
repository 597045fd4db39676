"""The server's side of a run folder: records in, rows of `server` and `batches` out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path
from typing import Any, TypeVar

from stagescope.errors import StagescopeError
from stagescope.kernels import KernelRow
from stagescope.records import BatchRecord, InstrumentCost, Record, RequestRecord, State, last_stage
from stagescope.runfolder.parquet import TableFile
from stagescope.runfolder.schema import BATCHES, KERNELS, SAMPLES, SERVER, STACKS, Table, parts_of
from stagescope.sample_names import SAMPLE_NAMES
from stagescope.samples import Sample
from stagescope.stacks import Frame, StackSpan
from stagescope.stages import STAGES


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


def _row(
    table: Table, computed: Mapping[str, Callable[[Any], object]]
) -> Callable[[Any], dict[str, Any]]:
    """Return what makes a row of *table*: its columns' own fields, and those *computed*."""
    taken = [(c.name, attrgetter(c.of), _elements(c.type)) for c in table.columns if c.of]

    def row(record: Any) -> dict[str, Any]:
        made = {
            name: convert(get(record)) if convert else get(record) for name, get, convert in taken
        }
        for name, compute in computed.items():
            made[name] = compute(record)
        return made

    return row


def _elements(type: str) -> Callable[[Iterable[Any]], list[Any]] | None:
    """Return what makes a column's list of a record's tuple; None for a column without a list."""
    if not type.startswith("list<"):
        return None
    names = tuple(parts_of(type))
    if not names:
        return list
    return lambda items: [{name: getattr(item, name) for name in names} for item in items]


_charged = _row(
    SERVER,
    {
        "state": lambda record: record.state.value,
        "died_in_stage": lambda r: last_stage(r) if r.state is State.DIED else "",
        "start_wall_ns": lambda record: record.process.anchor.wall(record.start_ns),
        "profiled": lambda record: record.profiled,
        "source": lambda record: "agent",
    },
)


def server_row(record: RequestRecord) -> dict[str, Any]:
    """Return *record* as a row of the `server` table."""
    return _charged(record) | _by_stage(record.stage_ns(), record.duration_ns)


_EMPTY = {"string": "", "int64": 0, "int32": 0, "bool": None}


def row_without_record(
    spent: Mapping[str, int], duration_ns: int, **known: object
) -> dict[str, Any]:
    """Return a row of the `server` table of a finished request of which there is no record.

    *spent* is by stage, *known* by column; other columns are empty, or null for not known.
    """
    empty = {column.name: _EMPTY.get(column.type, []) for column in SERVER.columns}
    unknown = {"stalls": None, "wait_facts": None, "state": State.FINISHED.value}
    timed = {"duration_ns": duration_ns, **_by_stage(spent, duration_ns)}
    return empty | unknown | timed | known


def _by_stage(spent: Mapping[str, int], duration_ns: int) -> dict[str, int]:
    charged = {f"{stage}_ns": spent.get(stage, 0) for stage in STAGES}
    return charged | {"other_ns": duration_ns - sum(charged.values())}


batch_row = _row(BATCHES, {"state": lambda record: record.state.value})


_NAMED = {named.name: named for named in SAMPLE_NAMES}

T = TypeVar("T")


def write_samples(folder: Path, samples: Iterable[Sample]) -> int:
    """Write `samples.parquet` of *folder* and return how many rows it has.

    Where *samples* itself fails in the middle, no file is left; that goes for all three.
    Raises StagescopeError where the file cannot be written.
    """
    return _write(folder, SAMPLES, samples, sample_row)


def write_stacks(folder: Path, stacks: Iterable[StackSpan]) -> int:
    """Write `stacks.parquet` of *folder* and return how many rows it has."""
    return _write(folder, STACKS, stacks, stack_row)


def write_kernels(folder: Path, kernels: Iterable[KernelRow]) -> int:
    """Write `kernels.parquet` of *folder* and return how many rows it has."""
    return _write(folder, KERNELS, kernels, kernel_row)


def _write(
    folder: Path, table: Table, items: Iterable[T], row: Callable[[T], dict[str, Any]]
) -> int:
    with TableFile(folder, table) as file:
        file.extend(map(row, items))
    return file.rows


def _unit_and_kind(name: str) -> tuple[str, str]:
    """Return unit and kind; empty where only a newer agent knows the name."""
    named = _NAMED.get(name)
    return (named.unit, named.kind) if named else ("", "")


sample_row = _row(
    SAMPLES,
    {
        "unit": lambda sample: _unit_and_kind(sample.name)[0],
        "kind": lambda sample: _unit_and_kind(sample.name)[1],
    },
)
stack_row = _row(
    STACKS,
    {
        "thread": lambda stack: _utf8(stack.thread),
        "frames": lambda stack: [_shown(frame) for frame in stack.frames],
    },
)
kernel_row = _row(KERNELS, {})


def _shown(frame: Frame) -> str:
    return _utf8(f"{frame.function} ({frame.file}:{frame.line})")


def _utf8(text: str) -> str:
    """Return *text* as valid Unicode: Python keeps undecodable bytes of file names as lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
