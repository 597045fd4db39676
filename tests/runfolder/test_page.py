"""docs/run-folder.md says of each table what `stagescope.runfolder.schema` says."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagescope.runfolder.schema import (
    EVIDENCE,
    MEMBER_TYPE,
    SCHEMA_VERSION,
    SPAN_TYPE,
    STALL_TYPE,
    TABLES,
    WAIT_FACT_TYPE,
    Table,
)

PAGE = Path(__file__).parents[2] / "docs" / "run-folder.md"
SHORT = {
    SPAN_TYPE: "list of spans",
    MEMBER_TYPE: "list of members",
    STALL_TYPE: "list of stalls",
    WAIT_FACT_TYPE: "list of wait facts",
}


def lines_of(table: Table) -> str:
    """Return the lines that the page must hold for *table*."""
    rows = [f"| `{c.name}` | {SHORT.get(c.type, c.type)} | {c.doc} |" for c in table.columns]
    heading = f"## `{table.file_name}`\n{table.doc}\n"
    return "\n".join([heading, "| column | type | what it is |", "| --- | --- | --- |", *rows])


@pytest.mark.parametrize("table", [*TABLES, *EVIDENCE], ids=lambda table: table.name)
def test_the_page_holds_every_column_as_the_code_has_it(table: Table) -> None:
    """Name, type and text of every column stand on the page, word for word."""
    assert lines_of(table) in PAGE.read_text("utf-8")


def test_the_page_names_the_schema_version() -> None:
    """A reader sees which version the page is about."""
    assert f"schema version {SCHEMA_VERSION}" in PAGE.read_text("utf-8")
