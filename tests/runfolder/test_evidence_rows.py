"""Samples, stacks and kernels as Parquet tables: whole, or not there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stagescope.errors import StagescopeError
from stagescope.runfolder.parquet import arrow_schema
from stagescope.runfolder.rows import write_kernels, write_samples, write_stacks
from stagescope.runfolder.schema import EVIDENCE
from stagescope.samples import Sample
from stagescope.stacks import Frame
from tests.support.evidence import kernel, sample, stack


def test_each_table_holds_what_was_given(tmp_path: Path) -> None:
    """Rows have the units of their names, frames are one text each, schemas are the published."""
    assert write_samples(tmp_path, [sample(), sample(pid=7, value=2.5)]) == 2
    assert write_stacks(tmp_path, [stack()]) == 1
    assert write_kernels(tmp_path, [kernel()]) == 1
    samples, stacks, kernels = (pq.read_table(tmp_path / t.file_name) for t in EVIDENCE)

    assert [table.schema for table in (samples, stacks, kernels)] == list(
        map(arrow_schema, EVIDENCE)
    )
    first, second = samples.to_pylist()
    assert (first["unit"], first["kind"], first["detail"]) == ("s", "amount", "host")
    assert (second["pid"], second["value"]) == (7, 2.5)
    assert stacks.to_pylist()[0]["frames"] == [
        "predict (/srv/app.py:12)",
        "decode (/srv/images.py:40)",
    ]
    assert kernels.to_pylist()[0]["busy_ns"] == 5_000_000


def test_a_name_of_a_newer_agent_has_no_unit(tmp_path: Path) -> None:
    """What we cannot know is empty, and the reading is kept."""
    write_samples(tmp_path, [sample(name="hw.later")])
    (row,) = pq.read_table(tmp_path / "samples.parquet").to_pylist()

    assert (row["name"], row["value"], row["unit"], row["kind"]) == ("hw.later", 0.25, "", "")


def test_odd_bytes_in_a_files_name_are_written(tmp_path: Path) -> None:
    """A path that is not UTF-8 costs its odd bytes and not the table."""
    write_stacks(tmp_path, [stack(frames=(Frame("f", "/srv/\udcff.py", 1),))])
    (row,) = pq.read_table(tmp_path / "stacks.parquet").to_pylist()

    assert row["frames"] == ["f (/srv/?.py:1)"]


def test_what_breaks_off_leaves_no_file(tmp_path: Path) -> None:
    """A table is never half of what there was."""

    def breaks_off() -> Iterator[Sample]:
        yield sample()
        raise StagescopeError("the agent has ended")

    with pytest.raises(StagescopeError, match="the agent has ended"):
        write_samples(tmp_path, breaks_off())
    assert list(tmp_path.iterdir()) == []
