"""Parquet files from the tables of `stagescope.runfolder.schema`, in bounded memory, whole or not at all.

Each row group is written as it fills; the file is `NAME.parquet.part` until its footer is on
disk, so a reader never meets half of one. Format: https://parquet.apache.org/docs/file-format/.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from stagescope.errors import StagescopeError
from stagescope.runfolder.schema import SCHEMA_VERSION, Column, Table, parts_of

ROWS_A_GROUP = 65_536

_PLAIN: Mapping[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "int32": pa.int32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
}


def _arrow_type(type: str) -> pa.DataType:
    if not type.startswith("list<"):
        return _PLAIN[type]
    parts = parts_of(type)
    if not parts:
        return pa.list_(_PLAIN[type.removeprefix("list<").removesuffix(">")])
    return pa.list_(pa.struct([(name, _PLAIN[part]) for name, part in parts.items()]))


_UNFIT = (OverflowError, ValueError, TypeError)
"""How Arrow says that a value does not fit its type (`ArrowInvalid` is a ValueError)."""

_UNIQUE = frozenset({"trace_id", "span_id", "parent_span_id", "batch_id"})
"""Strings that hardly repeat: a dictionary of them would only cost."""


def arrow_schema(table: Table) -> pa.Schema:
    """Return *table* as an Arrow schema; each column's documentation is its field's metadata."""
    return pa.schema(
        [pa.field(c.name, _arrow_type(c.type), metadata={"doc": c.doc}) for c in table.columns],
        metadata={"schema_version": str(SCHEMA_VERSION), "doc": table.doc},
    )


class TableFile:
    """One table being written; use it with `with`.

    An exception inside the block leaves no file.
    Raises StagescopeError, which names the file, where the disk is full or refuses.
    """

    def __init__(self, folder: Path, table: Table, *, rows_a_group: int = ROWS_A_GROUP) -> None:
        """The file appears in *folder* under its name when the block ends."""
        self.table = table
        self.file = folder / table.file_name
        self.rows = 0
        self.damaged = 0
        """Rows left out since a value does not fit its column: the record was damaged."""
        self._part = folder / f"{table.file_name}.part"
        self._schema = arrow_schema(table)
        self._rows_a_group = rows_a_group
        self._pending: list[Mapping[str, Any]] = []
        self._writer: pq.ParquetWriter | None = None

    def __enter__(self) -> Self:
        """Create the `.part` file."""
        try:
            self._writer = pq.ParquetWriter(
                self._part,
                self._schema,
                compression="zstd",
                use_dictionary=[c.name for c in self.table.columns if _repeats(c)],  # pyright: ignore
            )
        except OSError as problem:
            raise _unwritable(self._part, problem) from problem
        return self

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; it is on disk once its row group has filled."""
        self._pending.append(row)
        if len(self._pending) >= self._rows_a_group:
            self._flush()

    def extend(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add many rows."""
        for row in rows:
            self.append(row)

    def write_columns(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """Add a row group given as columns, all of one length."""
        self._flush()
        self._write({c.name: columns[c.name] for c in self.table.columns})

    def _flush(self) -> None:
        if self._pending:
            rows, self._pending = self._pending, []
            try:
                self._write(self._columns(rows))
            except _UNFIT:
                sound = [row for row in rows if self._fits(row)]
                self.damaged += len(rows) - len(sound)
                self._write(self._columns(sound))

    def _columns(self, rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Sequence[Any]]:
        return {c.name: [row[c.name] for row in rows] for c in self.table.columns}

    def _fits(self, row: Mapping[str, Any]) -> bool:
        try:
            for field in self._schema:
                pa.array([row[field.name]], field.type)
        except _UNFIT:
            return False
        return True

    def _write(self, columns: Mapping[str, Sequence[Any]]) -> None:
        assert self._writer is not None, "inside its `with` block"
        arrays = [pa.array(columns[field.name], field.type) for field in self._schema]
        group = pa.Table.from_arrays(arrays, schema=self._schema)
        try:
            self._writer.write_table(group)
        except OSError as problem:
            raise _unwritable(self.file, problem) from problem
        self.rows += group.num_rows

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give the file its name, or remove what there is of it."""
        try:
            if kind is None:
                self._finish()
        finally:
            self._drop()

    def _finish(self) -> None:
        assert self._writer is not None
        try:
            self._flush()
            self._writer.close()
            _to_disk(self._part)
            self._part.replace(self.file)
        except OSError as problem:
            raise _unwritable(self.file, problem) from problem

    def _drop(self) -> None:
        if self._writer is not None and self._writer.is_open:
            try:
                self._writer.close()
            except OSError:  # the footer found no room either; the reason is being told already
                self._writer.is_open = False
        self._part.unlink(missing_ok=True)


def _repeats(column: Column) -> bool:
    return column.type == "string" and column.name not in _UNIQUE


def _to_disk(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _unwritable(file: Path, problem: OSError) -> StagescopeError:
    return StagescopeError(
        f"{file} cannot be written: {problem.strerror or problem}; "
        "what was written before it is kept"
    )
