"""Server-Timing headers, ours and others', become rows of the server table or nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from stagescope.load_run.server_timing import parse_server_timing, server_rows
from stagescope.runfolder.schema import SERVER
from stagescope.stages import STAGES


def test_our_header_is_read() -> None:
    """Milliseconds become nanoseconds, by stage."""
    spent = parse_server_timing("queue;dur=1.25, preprocess;dur=0.5, total;dur=3")
    assert spent == {"queue": 1_250_000, "preprocess": 500_000, "total": 3_000_000}


def test_others_metrics_and_odd_parameters_are_left_alone() -> None:
    """Unknown names, missing, negative, infinite and doubled durations do not count."""
    header = 'cdn;desc="a, b;dur=9\\"";dur=1, queue ; DUR = "2" , batch;dur=x, queue;dur=7, '
    header += "inference;dur=-1, respond;dur=inf, postprocess, total;desc=z;dur=4"
    assert parse_server_timing(header) == {"queue": 2_000_000, "total": 4_000_000}


text = st.text(st.sampled_from(list(' ,;="\\.-eE0123456789infqueuetotaldur\0é')), max_size=200)


@given(text | st.text())
def test_no_header_makes_it_raise(header: str) -> None:
    """Whatever comes, it gives known names with durations of 0 or more."""
    for name, spent in parse_server_timing(header).items():
        assert name in (*STAGES, "total")
        assert spent >= 0


@given(st.dictionaries(st.sampled_from([*STAGES, "total"]), st.floats(0, 1e6)))
def test_rows_partition_their_total(spent_ms: dict[str, float]) -> None:
    """Stages and `other` sum to the duration; without a total there is no row."""
    header = ", ".join(f"{name};dur={ms}" for name, ms in spent_ms.items())
    client: dict[str, list[Any]] = {
        "trace_id": ["t" * 32],
        "span_id": ["s" * 16],
        "seq": [3],
        "status": [200],
        "server_timing": [header],
    }
    rows = list(server_rows(client))
    assert len(rows) == ("total" in spent_ms)
    for row in rows:
        assert set(row) == {column.name for column in SERVER.columns}
        charged = sum(row[f"{stage}_ns"] for stage in (*STAGES, "other"))
        assert charged == row["duration_ns"]
        assert row["other_ns"] >= 0
        assert (row["trace_id"], row["parent_span_id"]) == ("t" * 32, "s" * 16)
        assert row["source"] == "server-timing"
