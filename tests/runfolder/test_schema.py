"""The tables of a run folder follow from the records."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

from stagescope.records import RequestRecord
from stagescope.runfolder.schema import EVIDENCE, SCHEMA_VERSION, SERVER, TABLES

PAGE = Path(__file__).parents[2] / "docs" / "run-folder.md"


def test_a_described_field_is_a_column_with_its_type_and_text() -> None:
    """What stands beside a record's field is the column's description; others are no columns."""
    columns = {column.name: column for column in SERVER.columns}
    (status,) = (field for field in fields(RequestRecord) if field.name == "status")
    assert columns["status"].doc == status.metadata["column"]
    assert (columns["status"].type, columns["status"].of) == ("int32", "status")
    assert (columns["pid"].type, columns["pid"].of) == ("int64", "process.pid")
    assert "sampled" not in columns


def test_no_column_stands_twice() -> None:
    """Columns of a record and those computed beside them have names of their own."""
    for table in (*TABLES, *EVIDENCE):
        names = [column.name for column in table.columns]
        assert len(set(names)) == len(names)


def test_the_page_names_the_schema_version() -> None:
    """A reader sees which version the page is about."""
    assert f"schema version {SCHEMA_VERSION}" in PAGE.read_text("utf-8")
