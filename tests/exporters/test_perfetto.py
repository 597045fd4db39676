"""Our tracks in a trace: on its clock, and slices that Perfetto can nest."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.exporters import perfetto
from stagescope.exporters.perfetto import (
    Slice,
    batch_group,
    lanes,
    merged,
    request_group,
    thread_group,
    write_trace,
)
from stagescope.stages import StageSpan
from stagescope.testing.records import batch_record, request_record, stage_spans

BASE_NS = 1_790_000_000_000_000_000
OFFSET_NS = BASE_NS + 1_000_000
TORCH = {"baseTimeNanoseconds": BASE_NS, "traceEvents": [{"ph": "X", "name": "aten::add"}]}


def slices_of(trace: dict[str, Any]) -> dict[tuple[int, int], list[dict[str, Any]]]:
    """Return our slices by process and thread."""
    tracks: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    for event in trace["traceEvents"]:
        if event.get("cat") == "stagescope":
            tracks[event["pid"], event["tid"]].append(event)
    return tracks


def assert_nested(slices: list[tuple[float, float]]) -> None:
    """Each lies within another or apart from it."""
    for one in slices:
        for other in slices:
            apart = one[1] <= other[0] or other[1] <= one[0]
            within = one[0] <= other[0] <= other[1] <= one[1] or (
                other[0] <= one[0] <= one[1] <= other[1]
            )
            assert apart or within, (one, other)


def test_requests_and_batches_are_tracks_with_their_ids() -> None:
    """torch's events stay as they were; a request's slice has its trace id and its stages in it."""
    groups = [request_group([request_record()]), batch_group([batch_record()]), thread_group({})]
    trace = merged(TORCH, groups, OFFSET_NS)

    assert TORCH["traceEvents"][0] in trace["traceEvents"]  # type: ignore[index]
    of_request, of_batch = slices_of(trace).values()
    whole, *stages = of_request
    record = request_record()
    assert whole["name"] == "POST /predict"
    assert whole["args"]["trace_id"] == record.trace_id
    assert whole["ts"] == (record.start_ns + OFFSET_NS - BASE_NS) / 1e3
    assert whole["dur"] == record.duration_ns / 1e3
    assert {s["name"] for s in stages} == {span.stage for span in record.stages}
    assert of_batch[0]["args"]["size"] == 1


def test_requests_at_one_time_get_a_lane_each() -> None:
    """Two that overlap stand in two rows, a third one goes where there is room."""
    start = request_record().start_ns
    records = [request_record(start_ns=start + offset) for offset in (0, 5_000_000, 10_000_000)]
    tracks = slices_of(merged(TORCH, [request_group(records)], OFFSET_NS))

    assert [len([s for s in track if s["name"] == "POST /predict"]) for track in tracks.values()] == [
        2, 1
    ]  # fmt: skip


@given(st.lists(st.tuples(st.integers(0, 1_000), st.integers(1, 400)), max_size=20))
def test_stages_that_cross_are_cut_where_the_later_one_begins(
    drawn: list[tuple[int, int]],
) -> None:
    """Whatever a request's stages do, Perfetto can nest its slices, and each begins where it did."""
    stages = [(f"s{n}", start, start + lasts) for n, (start, lasts) in enumerate(drawn)]
    record = request_record(duration_ns=1_400, stages=stage_spans(stages, 1_400))
    group = request_group([record])
    (track,) = group.tracks

    assert_nested([(one.start_ns, one.end_ns) for one in track.slices])
    begun = sorted((one.name, one.start_ns - record.start_ns) for one in track.slices[1:])
    assert begun == sorted((name, start) for name, start, _ in stages)


@given(st.lists(st.tuples(st.integers(0, 1_000), st.integers(1, 400)), max_size=30))
def test_lanes_lose_nothing(drawn: list[tuple[int, int]]) -> None:
    """Every slice is in one row, and in each row slices nest."""
    slices = [Slice(str(n), start, start + lasts) for n, (start, lasts) in enumerate(drawn)]
    rows = lanes([[one] for one in slices], nested=True)

    assert sorted(one.name for row in rows for one in row) == sorted(one.name for one in slices)
    for row in rows:
        assert_nested([(one.start_ns, one.end_ns) for one in row])


def test_an_open_stage_of_one_that_died_is_shown(tmp_path: Path) -> None:
    """Its slice ends with the record."""
    span = StageSpan("inference", 10, 50, 40, False, True)
    group = request_group([request_record(duration_ns=50, stages=(span,))])

    assert [one.name for one in group.tracks[0].slices] == ["POST /predict", "inference"]


def test_a_large_trace_is_compressed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both open in Perfetto; no part file stays."""
    small = write_trace(tmp_path, TORCH)
    assert json.loads(small.read_bytes()) == TORCH
    monkeypatch.setattr(perfetto, "LARGE_BYTES", 10)
    large = write_trace(tmp_path, TORCH)
    assert large.name == "trace.json.gz"
    assert json.loads(gzip.decompress(large.read_bytes())) == TORCH
    assert sorted(file.name for file in tmp_path.iterdir()) == ["trace.json", "trace.json.gz"]
