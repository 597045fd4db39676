"""A run folder's tables as Ibis expressions: on DuckDB, or on any engine whose backend is given.

Parquet goes straight into the engine; this process sees only the figures that come out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import duckdb
import ibis
import ibis.expr.types as ir
import pyarrow as pa
import pyarrow.parquet as pq

from stagescope.errors import UsageError
from stagescope.runfolder.run import Run, read_run
from stagescope.runfolder.schema import (
    BATCHES,
    CLIENT,
    EVIDENCE,
    KERNELS,
    SAMPLES,
    SERVER,
    STACKS,
    TABLES,
    Table,
)

REQUIRED = {
    CLIENT.name: ("seq", "trace_id", "intended_ns", "last_byte_ns"),
    SERVER.name: ("trace_id", "duration_ns"),
    BATCHES.name: ("batch_id", "duration_ns"),
    SAMPLES.name: ("name", "start_ns", "end_ns", "value"),
    STACKS.name: ("start_ns", "end_ns", "frames"),
    KERNELS.name: ("capture_id", "kind", "busy_ns"),
}
"""Columns without which a file is not that table, whatever its version."""

_LIKE = {
    "string": (pa.types.is_string, pa.types.is_large_string, pa.types.is_dictionary),
    "int64": (pa.types.is_integer,),
    "int32": (pa.types.is_integer,),
    "float64": (pa.types.is_floating, pa.types.is_integer),
    "bool": (pa.types.is_boolean,),
    "list": (pa.types.is_list, pa.types.is_large_list),
}


@dataclass(frozen=True, slots=True)
class RunTables:
    """One run folder, opened: `run.json`, and each table with the columns of this version."""

    folder: Path
    run: Run
    client: ir.Table
    server: ir.Table
    batches: ir.Table
    samples: ir.Table
    """Without rows where the folder has no such file; so are the two below."""
    stacks: ir.Table
    kernels: ir.Table
    backend: Any
    """The Ibis backend that holds the tables."""
    own: bool
    """The backend is a DuckDB in memory of our own, which goes when the report is done."""


def open_run(folder: Path, backend: Any = None) -> RunTables:
    """Open *folder*; *backend* is a connected Ibis backend, by default DuckDB in memory.

    Raises UsageError, which names the file and the cause, where `run.json` or a table is missing,
    torn, foreign or newer.
    """
    run = read_run(folder)
    engine = backend or ibis.duckdb.connect()
    own = backend is None
    no_server_side = run.server_source == "none"

    def opened(table: Table, *, optional: bool = False) -> ir.Table:
        if optional and not (folder / table.file_name).exists():
            return _without_rows(engine, table, own=own)
        return _open(engine, folder, table)

    return RunTables(
        folder=folder,
        run=run,
        client=opened(CLIENT),
        server=opened(SERVER, optional=no_server_side),
        batches=opened(BATCHES, optional=no_server_side),
        samples=opened(SAMPLES, optional=True),
        stacks=opened(STACKS, optional=True),
        kernels=opened(KERNELS, optional=True),
        backend=engine,
        own=own,
    )


@contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Turn the engine's complaint about a damaged page into a sentence that names the file."""
    try:
        yield
    except duckdb.Error as problem:
        ours = isinstance(problem, duckdb.ProgrammingError)  # a wrong query, not a wrong file
        if ours and not isinstance(problem, duckdb.InvalidInputException):
            raise
        where = next(_damaged(folder), f"a table of {folder}")
        raise UsageError(f"{where} cannot be read: {_first_line(problem)}") from None


def _damaged(folder: Path) -> Iterator[str]:
    """Yield each table that does not read through to its end."""
    for file in (folder / table.file_name for table in (*TABLES, *EVIDENCE)):
        if not file.exists():
            continue
        try:
            for _ in pq.ParquetFile(file).iter_batches():
                pass
        except (OSError, pa.ArrowException):
            yield str(file)


def rows(expression: ir.Table) -> list[dict[str, Any]]:
    """Run *expression* and return its rows."""
    return cast("list[dict[str, Any]]", expression.to_pyarrow().to_pylist())


def rows_together(tables: RunTables, expressions: Sequence[ir.Table]) -> list[list[dict[str, Any]]]:
    """Run *expressions* at the same time where the engine is our own, else in turn.

    DuckDB computes the percentiles of a query on one core; two queries take two.
    """
    if not tables.own:
        return [rows(expression) for expression in expressions]
    queries = [tables.backend.compile(expression) for expression in expressions]
    with ThreadPoolExecutor(len(queries)) as pool:
        return list(pool.map(partial(_on_own_cursor, tables.backend.con), queries))


def row_batches(
    tables: RunTables, expression: ir.Table, at_a_time: int
) -> Iterator[pa.RecordBatch]:
    """Run *expression* and yield its rows in batches, so that memory stays bounded.

    Nothing else may be asked of the engine before the last batch.
    """
    backend = tables.backend
    if backend.name != "duckdb":
        yield from expression.to_pyarrow_batches(chunk_size=at_a_time)
        return
    # Ibis 12 asks DuckDB 2.0 for a method that is gone.
    yield from backend.con.sql(backend.compile(expression)).to_arrow_reader(at_a_time)


def _on_own_cursor(connection: Any, query: str) -> list[dict[str, Any]]:
    with connection.cursor() as cursor:
        return cast("list[dict[str, Any]]", cursor.sql(query).to_arrow_table().to_pylist())


def stored(tables: RunTables, expression: ir.Table) -> ir.Table:
    """Compute *expression* once, into a table that goes with the engine's connection.

    On DuckDB by `create table as`, which is faster than Ibis's create and insert.
    """
    backend, name = tables.backend, ibis.util.gen_name("stagescope")
    if backend.name != "duckdb":
        return cast(ir.Table, backend.create_table(name, expression, temp=True))
    # As in `_without_rows`.
    kind = "table" if tables.own else "temp table"
    backend.con.execute(f'create {kind} "{name}" as {backend.compile(expression)}')
    return cast(ir.Table, backend.table(name))


def uploaded(tables: RunTables, made: pa.Table) -> ir.Table:
    """Put rows that were computed here into the engine, as a table that goes with its connection."""
    backend, name = tables.backend, ibis.util.gen_name("stagescope")
    if backend.name != "duckdb":
        return cast(ir.Table, backend.create_table(name, made, temp=True))
    # Ibis 12 drops a view, by a statement that DuckDB 2.0 does not know.
    kind = "table" if tables.own else "temp table"
    backend.con.register(f"{name}_rows", made)
    backend.con.execute(f'create {kind} "{name}" as select * from "{name}_rows"')
    backend.con.unregister(f"{name}_rows")
    return cast(ir.Table, backend.table(name))


def _without_rows(engine: Any, table: Table, *, own: bool) -> ir.Table:
    name = ibis.util.gen_name(table.name)
    # A temporary table is one connection's only: `rows_together` has several of our own engine.
    return cast(ir.Table, engine.create_table(name, schema=_ibis_schema(table), temp=not own))


def _open(engine: Any, folder: Path, table: Table) -> ir.Table:
    file = folder / table.file_name
    schema = _schema_of(file)
    _check(file, table, schema)
    stored = engine.read_parquet(str(file))
    return cast(
        ir.Table,
        stored.select(
            **{
                column.name: (
                    _as(stored[column.name], column.type)
                    if column.name in schema.names
                    and not pa.types.is_null(schema.field(column.name).type)
                    else ibis.null(_ibis_type(column.type))
                )
                for column in table.columns
            }
        ),
    )


def _as(value: ir.Value, kind: str) -> ir.Value:
    return value if kind.startswith("list") else value.cast(_ibis_type(kind))


def _schema_of(file: Path) -> pa.Schema:
    try:
        return pq.read_schema(file)
    except FileNotFoundError:
        raise UsageError(f"{file} is missing: the run folder is not complete") from None
    except OSError as problem:
        cause = problem.strerror or _first_line(problem)
        raise UsageError(f"{file} cannot be read: {cause}") from None
    except pa.ArrowInvalid as problem:
        raise UsageError(f"{file} is torn or not Parquet: {_first_line(problem)}") from None


def _check(file: Path, table: Table, schema: pa.Schema) -> None:
    missing = [name for name in REQUIRED[table.name] if name not in schema.names]
    if missing:
        raise UsageError(f"{file} is not a `{table.name}` table: it has no {', '.join(missing)}")
    for column in table.columns:
        if column.name not in schema.names:
            continue
        kind = schema.field(column.name).type
        if pa.types.is_null(kind):
            continue  # written from no value at all
        if not any(like(kind) for like in _LIKE[column.type.partition("<")[0]]):
            raise UsageError(
                f"{file} is not a `{table.name}` table: "
                f"column {column.name} is {kind}, not {column.type}"
            )


def _ibis_schema(table: Table) -> ibis.Schema:
    return ibis.schema({column.name: _ibis_type(column.type) for column in table.columns})


def _ibis_type(kind: str) -> str:
    """Turn a type of `stagescope.runfolder.schema` into Ibis's words."""
    words = kind.replace("bool", "boolean")
    if words.startswith("list<") and ": " in words:
        return f"array<struct<{words[5:-1]}>>"
    return words.replace("list<", "array<")


def _first_line(problem: Exception) -> str:
    return str(problem).partition("\n")[0]
