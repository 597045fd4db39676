"""The table of attributes names each once, and what is exported is in it."""

from __future__ import annotations

from stagescope.exporters.otlp.spans import process_attributes
from stagescope.semconv import ATTRIBUTES, METRICS
from stagescope.testing.records import PROCESS


def test_names_are_unique() -> None:
    """No name stands twice."""
    for named in (ATTRIBUTES, METRICS):
        names = [entry.name for entry in named]
        assert len(set(names)) == len(names)


def test_resource_attributes_are_in_the_table() -> None:
    """A resource carries exactly what the table says."""
    assert set(process_attributes(PROCESS)) == {a.name for a in ATTRIBUTES if "resource" in a.on}
