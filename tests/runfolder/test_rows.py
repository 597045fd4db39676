"""Records of the agent become rows of `server` and `batches`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.errors import StagescopeError
from stagescope.records import (
    Anchor,
    BatchRecord,
    InstrumentCost,
    Member,
    Process,
    Record,
    RequestRecord,
    State,
)
from stagescope.runfolder.rows import server_row, write_records, write_rows
from stagescope.runfolder.schema import BATCHES, SERVER
from stagescope.stages import KNOWN, STAGES, StageSpan, StageStall, partition

PROCESS = Process(
    ring_id="a" * 32,
    pid=7,
    service="svc",
    host="h",
    boot_id="b",
    anchor=Anchor(1_000, 5_000),
    cost=InstrumentCost(2_000, 300),
    version="1",
    python="3.11",
)


def request(stages: tuple[StageSpan, ...], duration_ns: int = 1_000) -> RequestRecord:
    """A finished request with *stages*."""
    return RequestRecord(
        process=PROCESS,
        seq=1,
        state=State.FINISHED,
        trace_id="1" * 32,
        span_id="2" * 16,
        parent_span_id="3" * 16,
        internal=False,
        sampled=True,
        run_id="r",
        start_ns=1_500,
        duration_ns=duration_ns,
        method="POST",
        path="/x",
        route="/{p}",
        status=200,
        error="",
        request_bytes=1,
        response_bytes=2,
        first_byte_ns=900,
        send_wait_ns=0,
        chunks=1,
        stages=stages,
        batch_ids=("4" * 16,),
        stages_dropped=0,
    )


def batch() -> BatchRecord:
    """A batch of one."""
    return BatchRecord(
        process=PROCESS,
        seq=2,
        state=State.DIED,
        batch_id="4" * 16,
        trace_id="5" * 32,
        model="m",
        start_ns=1_600,
        duration_ns=100,
        error="",
        size=1,
        members=(Member("1" * 32, "2" * 16),),
        members_dropped=0,
        device_ns=0,
        stages=(StageSpan("inference", 0, 50, 50),),
        run_id="r",
    )


names = st.sampled_from([*KNOWN[1:], "mine", "mine.own"])


@given(st.lists(st.tuples(names, st.integers(0, 900), st.integers(0, 900)), max_size=8))
def test_stage_columns_and_other_sum_to_the_duration(openings: list[tuple[str, int, int]]) -> None:
    """The row keeps the partition, sub-stages in their stage and the user's own in `other`."""
    intervals = [(min(a, b), max(a, b)) for _, a, b in openings]
    charged, _ = partition(intervals, 1_000)
    spans = tuple(
        StageSpan(name, start, end, spent)
        for (name, _, _), (start, end), spent in zip(openings, intervals, charged, strict=True)
    )
    row = server_row(request(spans))
    assert sum(row[f"{stage}_ns"] for stage in (*STAGES, "other")) == row["duration_ns"]
    own = sum(span.self_ns for span in spans if span.stage.startswith("mine"))
    assert row["other_ns"] >= own


def test_stalls_stand_in_the_row() -> None:
    """What each stage was charged in a stall is kept with stage, cause and nanoseconds."""
    stalled = replace(request(()), stalls=(StageStall(-1, "other", "gc", 7),))
    assert server_row(stalled)["stalls"] == [{"stage": "other", "cause": "gc", "stall_ns": 7}]


def test_records_become_two_tables(tmp_path: Path) -> None:
    """Each record is a row with every column, wall time from the process's own anchor."""
    span = StageSpan("queue.batch", 0, 400, 400, failed=True)
    side = write_records(tmp_path, [request((span,)), batch()])
    (server,) = pq.read_table(tmp_path / SERVER.file_name).to_pylist()
    (batches,) = pq.read_table(tmp_path / BATCHES.file_name).to_pylist()
    assert (side.requests, side.batches) == (1, 1)
    assert side.costs == {"a" * 32: InstrumentCost(2_000, 300)}
    assert server["queue_ns"] == 400
    assert server["start_wall_ns"] == 5_500
    assert server["stages"][0]["failed"]
    assert server["batch_ids"] == ["4" * 16]
    assert batches["members"] == [{"trace_id": "1" * 32, "span_id": "2" * 16}]
    assert batches["state"] == "died"


def test_a_source_that_breaks_off_loses_nothing_before_it(tmp_path: Path) -> None:
    """What had come is written, and whoever asked is informed."""

    def broken() -> Iterator[Record]:
        yield request(())
        raise StagescopeError("the agent went away")

    told: list[StagescopeError] = []
    assert write_records(tmp_path, broken(), broken=told.append).requests == 1
    assert [str(problem) for problem in told] == ["the agent went away"]
    assert pq.read_table(tmp_path / SERVER.file_name).num_rows == 1
    with pytest.raises(StagescopeError, match="went away"):
        write_records(tmp_path, broken())


def test_without_rows_both_files_are_there(tmp_path: Path) -> None:
    """A reader finds all tables of a run folder."""
    assert write_rows(tmp_path, ()).requests == 0
    assert pq.read_table(tmp_path / SERVER.file_name).num_rows == 0
    assert pq.read_table(tmp_path / BATCHES.file_name).num_rows == 0
