"""Opening a run folder: older ones are read, broken ones are named."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stagescope.analysis.build import build_report
from stagescope.analysis.sources import open_run, rows, rows_together
from stagescope.errors import UsageError
from stagescope.runfolder.schema import CLIENT, EVIDENCE, SAMPLES, SERVER, STACKS, Table
from tests.support.runs import MS, client_row, server_row, write_run_folder, write_table


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a run folder of three requests."""
    client = [client_row(seq) for seq in range(3)]
    return write_run_folder(
        tmp_path, client, [server_row(row, {"inference": 5 * MS}) for row in client]
    )


def drop(file: Path, *names: str) -> None:
    """Take columns out of a table, as if an older version had written it."""
    pq.write_table(pq.read_table(file).drop_columns(list(names)), file)


def test_a_column_of_a_later_version_reads_as_null(folder: Path) -> None:
    """What an older file lacks is null, of the type that it has today."""
    drop(folder / SERVER.file_name, "source", "stages_dropped", "batch_ids")

    tables = open_run(folder)
    (row, *_) = rows(tables.server.limit(1))
    types = {name: str(kind) for name, kind in tables.server.schema().items()}
    tables.backend.disconnect()

    assert (row["source"], row["stages_dropped"], row["batch_ids"]) == (None, None, None)
    assert types["batch_ids"] == "array<string>"


def test_an_old_folder_has_a_report(folder: Path) -> None:
    """A report needs the required columns only; what is missing costs its own figures."""
    drop(folder / SERVER.file_name, "stages", "source", "boot_id", "other_ns", "stages_dropped")
    drop(folder / CLIENT.file_name, "connected_ns", "sent_ns", "phase")

    report = build_report(folder)

    assert report.join.requests == 3
    assert report.total is not None
    assert sum(part.mean_ms for part in report.parts) == pytest.approx(report.total.mean_ms)


def test_a_folder_without_evidence(folder: Path) -> None:
    """Samples, stacks and kernels that no agent gave are tables without rows, like any other."""
    tables = open_run(folder)
    asked = [tables.samples.limit(1), tables.stacks.limit(1), tables.kernels.limit(1)]
    found = rows_together(tables, asked)
    columns = [tuple(one.columns) for one in (tables.samples, tables.stacks, tables.kernels)]
    tables.backend.disconnect()

    assert found == [[], [], []]
    assert columns == [tuple(column.name for column in table.columns) for table in EVIDENCE]


def test_a_folder_with_evidence(folder: Path) -> None:
    """What an agent gave is read as it was written."""
    write_table(folder, SAMPLES, [{"name": "hw.power", "start_ns": 1, "end_ns": 2, "value": 3.5}])
    write_table(folder, STACKS, [{"start_ns": 1, "end_ns": 2, "frames": ["main (app.py:1)"]}])

    tables = open_run(folder)
    samples, stacks = rows(tables.samples), rows(tables.stacks)
    tables.backend.disconnect()

    assert [(row["name"], row["value"]) for row in samples] == [("hw.power", 3.5)]
    assert [row["frames"] for row in stacks] == [["main (app.py:1)"]]


@pytest.mark.parametrize("table", EVIDENCE, ids=lambda table: table.name)
def test_torn_evidence(folder: Path, table: Table) -> None:
    """A table that may be missing may not be torn."""
    (folder / table.file_name).write_bytes(b"PAR1")

    with pytest.raises(UsageError, match=rf"{table.name}\.parquet is torn or not Parquet: "):
        open_run(folder)


def test_a_folder_without_run_json(tmp_path: Path) -> None:
    """A folder that is no run folder is named."""
    with pytest.raises(UsageError, match=r"is no run folder: it has no run\.json"):
        build_report(tmp_path)


def test_a_newer_schema(folder: Path) -> None:
    """A folder of a later stagescope says that an upgrade reads it."""
    data = json.loads((folder / "run.json").read_text("utf-8"))
    (folder / "run.json").write_text(json.dumps(data | {"schema_version": 99}), "utf-8")

    with pytest.raises(UsageError, match="schema 99"):
        build_report(folder)


def test_a_missing_table(folder: Path) -> None:
    """A table that is not there is named."""
    (folder / "client.parquet").unlink()

    with pytest.raises(UsageError, match=r"client\.parquet is missing"):
        build_report(folder)


def test_a_torn_table(folder: Path) -> None:
    """A table whose end is missing is named, with the cause."""
    file = folder / "server.parquet"
    file.write_bytes(file.read_bytes()[:-20])

    with pytest.raises(UsageError, match=r"server\.parquet is torn or not Parquet: "):
        build_report(folder)


def test_an_empty_file(folder: Path) -> None:
    """An empty file is torn too."""
    (folder / "batches.parquet").write_bytes(b"")

    with pytest.raises(UsageError, match=r"batches\.parquet is torn or not Parquet: "):
        build_report(folder)


def test_a_damaged_page(folder: Path) -> None:
    """Damage inside a table, found only when its pages are read, is one sentence as well."""
    file = folder / "client.parquet"
    data = bytearray(file.read_bytes())
    data[4:900] = b"\xff" * 896
    file.write_bytes(data)

    with pytest.raises(UsageError, match=r"client\.parquet cannot be read: "):
        build_report(folder)


def test_another_programs_table(folder: Path) -> None:
    """Parquet that is not the table says which columns it has not."""
    write_table(folder, SERVER, [])
    (folder / "server.parquet").replace(folder / "client.parquet")
    drop(folder / "client.parquet", "seq")

    with pytest.raises(UsageError, match="is not a `client` table: it has no seq, intended_ns"):
        build_report(folder)


def test_a_column_of_another_type(folder: Path) -> None:
    """A column of the wrong type is named with both types."""
    file = folder / "client.parquet"
    table = pq.read_table(file)
    pq.write_table(table.set_column(0, "seq", table["trace_id"]), file)

    with pytest.raises(UsageError, match="column seq is string, not int64"):
        build_report(folder)
