"""The published page and the table in the code are one."""

from __future__ import annotations

from pathlib import Path

from stagescope.exporters.otlp.spans import process_attributes
from stagescope.semconv import ATTRIBUTES, METRICS, page_tables
from stagescope.testing.records import PROCESS

PAGE = Path(__file__).parents[1] / "docs" / "attributes.md"


def test_page_holds_the_tables() -> None:
    """docs/attributes.md holds the tables as the code has them: paste what this prints."""
    assert page_tables() in PAGE.read_text(encoding="utf-8"), page_tables()


def test_names_are_unique() -> None:
    """No name stands twice."""
    for named in (ATTRIBUTES, METRICS):
        names = [entry.name for entry in named]
        assert len(set(names)) == len(names)


def test_resource_attributes_are_in_the_table() -> None:
    """A resource carries exactly what the table says."""
    assert set(process_attributes(PROCESS)) == {a.name for a in ATTRIBUTES if "resource" in a.on}
