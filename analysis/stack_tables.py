"""A run folder's stacks, and the requests that they are laid over."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from stagescope.analysis.stack_diff import Request, StageInterval
from stagescope.errors import UsageError
from stagescope.stacks import StackSpan, parse_frame
from stagescope.tables import SERVER, STACKS, Table

_REQUEST_COLUMNS = ("pid", "start_ns", "duration_ns", "stages")


def read_stacks(folder: Path) -> list[StackSpan]:
    """Read `stacks.parquet` of the run in *folder*, in the order of time.

    Raises UsageError where there is none, or it cannot be read.
    """
    if not (folder / STACKS.file_name).exists():
        raise UsageError(
            f"{folder} has no {STACKS.file_name}: no agent sampled stacks in this run "
            "(docs/stacks.md tells when one does)"
        )
    rows = _rows(folder, STACKS, tuple(column.name for column in STACKS.columns))
    spans = [
        StackSpan(**row | {"frames": tuple([parse_frame(text) for text in row["frames"]])})
        for row in rows
    ]
    return sorted(spans, key=lambda span: span.start_ns)


def read_requests(folder: Path) -> list[Request]:
    """Read the requests of `server.parquet` with the stages that each of them went through.

    Raises UsageError where there is none, or it cannot be read.
    """
    return [
        Request(
            row["pid"],
            row["duration_ns"],
            tuple(
                StageInterval(s["stage"], row["start_ns"] + s["start_ns"],
                              row["start_ns"] + s["end_ns"])
                for s in row["stages"] or ()
            ),
        )
        for row in _rows(folder, SERVER, _REQUEST_COLUMNS)
    ]  # fmt: skip


def _rows(folder: Path, table: Table, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    file = folder / table.file_name
    try:
        with pq.ParquetFile(file) as opened:
            for group in opened.iter_batches(columns=list(columns)):
                yield from group.to_pylist()
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {table.file_name}") from None
    except (pa.ArrowException, OSError, KeyError) as problem:
        raise UsageError(f"{file} cannot be read: {problem}") from None
