"""Waits in the report: the fields of the JSON, the matrix of who held whom, and its sentence."""

from __future__ import annotations

import io
import json
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from stagescope.analysis.build import build_report
from stagescope.analysis.report import Report
from stagescope.analysis.table import render
from tests.support.queues import loop_run

CAUSES = {"event_loop", "gil", "gc", "cpu", "threadpool", "batch", "stopped"}
OWN = {"own_mean_ms", "own_p50_ms", "own_p95_ms", "own_p99_ms", "own_low_ms", "own_high_ms"}


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Of 40 requests every second one comes 1 ms after another, whose preprocess takes 30 ms."""
    at = np.array([pair * 100.0 + late for pair in range(20) for late in (0, 1)])
    return build_report(loop_run(tmp_path_factory.mktemp("run"), at, np.full(40, 30.0), 5.0))


def told(report: Report) -> dict[str, Any]:
    """Return the JSON, read again."""
    read: dict[str, Any] = json.loads(json.dumps(report.to_json()))
    return read


def test_each_stage_has_own_time_its_bounds_and_its_waits(report: Report) -> None:
    """Own time and the waits of a stage sum to its time, between the bounds."""
    for stage in told(report)["stages"]:
        assert stage.keys() >= OWN | {"waits"}
        if not stage["recorded"]:
            continue
        assert set(stage["waits"]) <= CAUSES
        whole = stage["own_mean_ms"] + sum(stage["waits"].values())
        assert whole == pytest.approx(stage["mean_ms"])
        assert stage["own_low_ms"] <= stage["own_mean_ms"] <= stage["own_high_ms"]


def test_each_wait_has_its_figures_and_who_held_it(report: Report) -> None:
    """Half of the requests waited 29 ms for the loop, all of it while preprocess of others ran."""
    waits = told(report)["waits"]
    figures = {"mean_ms", "p50_ms", "p95_ms", "p99_ms", "low_ms", "high_ms"}
    for wait in waits:
        assert wait.keys() >= figures | {"cause", "held_by"}
        assert wait["cause"] in CAUSES
    (loop,) = [wait for wait in waits if wait["cause"] == "event_loop"]
    assert loop["mean_ms"] == pytest.approx(14.5, abs=1)
    (holder,) = loop["held_by"]
    assert holder.keys() == {"stage", "where", "share"}
    assert (holder["stage"], holder["share"]) == ("preprocess", pytest.approx(1))


def test_the_matrix_says_which_stage_held_which(report: Report) -> None:
    """A cell a pair: what waited, which stage of other requests ran meanwhile, and for how long."""
    (cell,) = told(report)["held"]
    assert (cell["waited"], cell["stage"]) == ("network.request", "preprocess")
    assert cell["mean_ms"] == pytest.approx(14.5, abs=1)
    screen = Console(width=200, record=True, file=io.StringIO())
    screen.print(render(report))
    assert (
        f"network.request waited {cell['mean_ms']:.3f} ms for the event loop; "
        "100.0% of that while preprocess of other requests ran"
    ) in screen.export_text()
