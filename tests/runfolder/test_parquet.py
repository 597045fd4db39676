"""The tables of a run folder, written to real Parquet files and read back by Arrow."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagescope.errors import StagescopeError
from stagescope.runfolder.parquet import TableFile, arrow_schema
from stagescope.runfolder.schema import (
    CLIENT,
    MEMBER_TYPE,
    SCHEMA_VERSION,
    SPAN_TYPE,
    STALL_TYPE,
    TABLES,
    WAIT_FACT_TYPE,
    Table,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "string": TEXT,
    "int64": INT64,
    "int32": st.integers(-(2**31), 2**31 - 1),
    "bool": st.booleans(),
    "list<string>": st.lists(TEXT, max_size=3),
    SPAN_TYPE: st.lists(
        st.fixed_dictionaries(
            {
                "stage": TEXT,
                "start_ns": INT64,
                "end_ns": INT64,
                "self_ns": INT64,
                "failed": st.booleans(),
            }
        ),
        max_size=3,
    ),
    STALL_TYPE: st.lists(
        st.fixed_dictionaries({"stage": TEXT, "cause": TEXT, "stall_ns": INT64}), max_size=3
    ),
    WAIT_FACT_TYPE: st.lists(
        st.fixed_dictionaries({"kind": TEXT, "loop": INT64, "start_ns": INT64, "end_ns": INT64}),
        max_size=3,
    ),
    MEMBER_TYPE: st.lists(st.fixed_dictionaries({"trace_id": TEXT, "span_id": TEXT}), max_size=3),
}


def rows_of(table: Table) -> st.SearchStrategy[list[dict[str, Any]]]:
    """Any rows that *table* can hold."""
    row = st.fixed_dictionaries({c.name: VALUES[c.type] for c in table.columns})
    return st.lists(row, max_size=5)


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=15)
@given(data=st.data())
def test_every_table_comes_back_as_it_went(
    table: Table, data: st.DataObject, tmp_path: Path
) -> None:
    """Any rows survive the round trip, over several row groups; the part file is gone."""
    rows = data.draw(rows_of(table))
    with TableFile(tmp_path, table, rows_a_group=2) as file:
        file.extend(rows)
    assert pq.read_table(file.file).to_pylist() == rows
    assert [entry.name for entry in tmp_path.iterdir()] == [table.file_name]


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.name)
def test_schema_carries_documentation_and_version(table: Table, tmp_path: Path) -> None:
    """Each column's text stands in the file, and the file says which schema it has."""
    with TableFile(tmp_path, table):
        pass
    schema = pq.read_schema(tmp_path / table.file_name)
    assert schema.equals(arrow_schema(table))
    assert schema.metadata[b"schema_version"] == str(SCHEMA_VERSION).encode()
    for column in table.columns:
        assert schema.field(column.name).metadata[b"doc"] == column.doc.encode()


def test_an_exception_inside_leaves_no_file(tmp_path: Path) -> None:
    """Whole or not at all."""
    with pytest.raises(ZeroDivisionError), TableFile(tmp_path, CLIENT):
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())


def write_many(folder: Path, rows: int) -> None:
    """Write *rows* rows of incompressible ids to the client table of *folder*."""
    row: dict[str, Any] = {c.name: c.type != "bool" and 0 for c in CLIENT.columns}
    row |= {"reused": False, "phase": "", "error": "", "server_timing": ""}
    with TableFile(folder, CLIENT, rows_a_group=100) as file:
        for n in range(rows):
            file.append(row | {"trace_id": f"{n * 7919**9:032x}"[-32:], "span_id": f"{n:016x}"})


def test_a_folder_that_is_gone_is_named(tmp_path: Path) -> None:
    """One sentence that names the file."""
    with pytest.raises(StagescopeError, match=r"gone/client\.parquet\.part cannot be written"):
        write_many(tmp_path / "gone", 1)


@contextmanager
def files_at_most(size_bytes: int) -> Iterator[None]:
    """The kernel refuses every byte beyond *size_bytes* of a file (EFBIG), as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def test_no_room_on_the_disk_is_one_sentence_and_leaves_other_files(tmp_path: Path) -> None:
    """The table that found no room is named and gone; the one before it stays readable."""
    batches = next(table for table in TABLES if table.name == "batches")
    with TableFile(tmp_path, batches):
        pass
    with files_at_most(20_000), pytest.raises(StagescopeError, match=r"client\.parquet cannot be"):
        write_many(tmp_path, 10_000)
    assert [entry.name for entry in tmp_path.iterdir()] == ["batches.parquet"]
    assert pq.read_table(tmp_path / "batches.parquet").num_rows == 0
