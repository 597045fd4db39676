"""Readings weighted by the requests in a stage, against the same by brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stagescope.analysis.resources.attribution import (
    GPU_BUSY,
    GPU_MEMORY,
    RSS,
    StageWeightedMeans,
    cells,
    readings,
)
from stagescope.analysis.resources.window import Window
from stagescope.analysis.sources import open_run
from tests.support.runs import MS, client_row, level_row, server_row, write_run_folder

WINDOW = Window(1_000 * MS, 3_000 * MS, warmup_included=False)
SPENT = st.lists(
    st.tuples(st.sampled_from(["queue", "inference", "inference.d2h"]), st.integers(0, 90)),
    min_size=1,
    max_size=3,
    unique_by=lambda stage: stage[0],
)


def weighted(folder: Path, pids: tuple[int, ...] = (1,)) -> StageWeightedMeans:
    """Return the weighted readings of the run in *folder*."""
    tables = open_run(folder)
    means = StageWeightedMeans(readings(tables.samples, WINDOW, pids))
    means.read(tables)
    tables.backend.disconnect()
    return means


def overlap(server: list[dict[str, Any]], stage: str, begin: int, end: int) -> int:
    """Return the request-nanoseconds in *stage* from begin to end, one opening after the other."""
    return sum(
        max(
            0, min(end, row["start_ns"] + s["end_ns"]) - max(begin, row["start_ns"] + s["start_ns"])
        )
        for row in server
        for s in row["stages"]
        if s["stage"] == stage
    )


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=12, deadline=None
)
@given(
    requests=st.lists(SPENT, min_size=1, max_size=6),
    busy=st.lists(st.floats(0, 1), min_size=2, max_size=8),
)
def test_a_mean_is_weighted_by_requests(
    requests: list[list[tuple[str, int]]], busy: list[float], tmp_path: Path
) -> None:
    """Each window counts as often as requests were in the stage in it, and for as long."""
    server = [
        server_row(client_row(seq), {name: ms * MS for name, ms in spent})
        for seq, spent in enumerate(requests)
    ]
    step = 600 * MS // len(busy)
    edges = [1_000 * MS + step * index for index in range(len(busy) + 1)]
    samples = [
        level_row(GPU_BUSY, value, edges[index], edges[index + 1], pid=0, device="GPU-1")
        for index, value in enumerate(busy)
    ]
    means = weighted(write_run_folder(tmp_path, [client_row(0)], server, samples=samples))

    for stage in ("queue", "inference", "inference.d2h"):
        weights = [
            overlap(server, stage, edges[index], edges[index + 1]) for index in range(len(busy))
        ]
        mean = means.mean(GPU_BUSY, [stage])
        if sum(weights):
            assert mean is not None
            assert mean.weight_ns == sum(weights)
            assert mean.value == pytest.approx(float(np.average(busy, weights=weights)))
        else:
            assert mean is None


def test_a_stage_that_fills_no_window_is_told(tmp_path: Path) -> None:
    """Fill is how much of the windows that it was in a stage really lasted."""
    client = client_row(0)
    server = server_row(client, {"queue": 2 * MS, "inference": 200 * MS})
    begin = server["start_ns"]
    samples = [
        level_row(GPU_BUSY, 0.5, begin + at * 100 * MS, begin + (at + 1) * 100 * MS, pid=0)
        for at in range(3)
    ]
    means = weighted(write_run_folder(tmp_path, [client], [server], samples=samples))

    queue, inference = means.mean(GPU_BUSY, ["queue"]), means.mean(GPU_BUSY, ["inference"])

    assert queue is not None
    assert inference is not None
    assert queue.fill == pytest.approx(0.02)
    assert inference.fill > 0.95
    assert means.median_window_s(GPU_BUSY) == pytest.approx(0.1)


def test_memory_is_that_of_the_requests_own_process(tmp_path: Path) -> None:
    """RSS of one process is weighted by the requests in it; the device's by all."""
    clients = [client_row(0), client_row(1)]
    server = [
        server_row(clients[0], {"inference": 30 * MS}, pid=1),
        server_row(clients[1], {"queue": 30 * MS}, pid=2),
    ]
    moments = [at * 50 * MS + 1_000 * MS for at in range(6)]
    samples = [
        *(level_row(RSS, 100.0, at, pid=1) for at in moments),
        *(level_row(RSS, 300.0, at, pid=2) for at in moments),
        *(level_row(RSS, 900.0, at, pid=3) for at in moments),
        *(level_row(GPU_MEMORY, 7.0, at, pid=0, device="GPU-1") for at in moments),
    ]
    means = weighted(write_run_folder(tmp_path, clients, server, samples=samples), (1, 2))

    found = {
        (name, stage): mean.value
        for name in (RSS, GPU_MEMORY)
        for stage in ("inference", "queue")
        if (mean := means.mean(name, [stage]))
    }

    assert found == {
        (RSS, "inference"): 100.0,
        (RSS, "queue"): 300.0,
        (GPU_MEMORY, "inference"): 7.0,
        (GPU_MEMORY, "queue"): 7.0,
    }


def test_profiled_requests_weigh_nothing(tmp_path: Path) -> None:
    """A request that a capture was at work in is not in the mean."""
    clients = [client_row(0), client_row(1)]
    server = [
        server_row(clients[0], {"inference": 30 * MS}),
        server_row(clients[1], {"queue": 30 * MS}, profiled=True),
    ]
    samples = [level_row(GPU_BUSY, 1.0, 1_000 * MS, 2_000 * MS, pid=0)]
    means = weighted(write_run_folder(tmp_path, clients, server, samples=samples))

    assert means.stages() == {"inference"}


def test_a_moment_reaches_halfway_to_its_neighbours() -> None:
    """Cells of a regular series touch; a gap in the series belongs to nobody."""
    begin, end = cells(np.array([0, 10, 20, 100], np.int64))

    assert begin.tolist() == [-5, 5, 15, 95]
    assert end.tolist() == [5, 15, 25, 105]
    assert [edge.tolist() for edge in cells(np.array([7], np.int64))] == [
        [7 - 500 * MS],
        [7 + 500 * MS],
    ]
