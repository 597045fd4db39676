"""Thirteen small servers whose stages' own times are known, under load: the report finds them.

A stage's time is planted as CPU time or sleep; what the machine takes away meanwhile must come
out as a wait, so the bounds hold on a busy machine too.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.analysis.build import build_report
from stagescope.analysis.report import Own, Report
from stagescope.load_run.plan import LoadPlan
from stagescope.load_run.run import execute
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.server_processes import free_port, port_is_free

SERVER = Path(__file__).parent / "server.py"
PLANTED: dict[str, dict[str, float]] = {
    "headline": {"preprocess": 18, "inference": 5},
    "blocking": {"preprocess": 18, "inference": 5},
    "worker_thread": {"preprocess": 12, "inference": 12},
    "to_thread": {"preprocess": 12, "inference": 12},
    "executor": {"preprocess": 12, "inference": 12},
    "answer_queue": {"preprocess": 12, "inference": 8},
    "child_task": {"preprocess": 12, "inference": 8},
    "gathered": {"preprocess": 12, "inference": 8},
    "task_group": {"preprocess": 18, "inference": 5},
    "event": {"preprocess": 12, "inference": 8},
    "in_steps": {"preprocess": 8, "inference": 8},
    "postprocess_holds": {"inference": 8, "postprocess": 14},
    "collections": {"preprocess": 8, "inference": 8},
}
"""Own time of each stage, ms, by path."""


@pytest.fixture(scope="module", params=["asyncio", "uvloop"])
def served(request: pytest.FixtureRequest) -> Iterator[tuple[int, Path]]:
    """The server on one of the loops, with an agent beside it: its port and its spool."""
    port = free_port()
    with short_spool() as spool, AgentProcesses() as agents:
        agents(spool)
        server = subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--loop",
             request.param, "--log-level", "warning", "--no-access-log"],
            cwd=SERVER.parent, env=os.environ | {"STAGESCOPE_SPOOL": str(spool)},
        )  # fmt: skip
        try:
            wait_until(lambda: not port_is_free(port), 20)
            yield port, spool
        finally:
            server.kill()
            server.wait()


def loaded(served: tuple[int, Path], path: str, folder: Path) -> Report:
    """Load one path, near what one core can take, and return the report."""
    port, spool = served
    plan = LoadPlan(rate_per_s=25.0, duration_s=1.5, warmup_s=0.0, out=folder / "run", spool=spool)
    return build_report(execute(plan, f"http://127.0.0.1:{port}/{path}").path)


def own(report: Report, stage: str) -> Own:
    """Return a stage's own time."""
    part = report.part(stage)
    assert part is not None
    assert part.own is not None, stage
    return part.own


@pytest.mark.parametrize("path", PLANTED)
def test_each_stage_takes_itself_what_was_planted(
    served: tuple[int, Path], path: str, tmp_path: Path
) -> None:
    """The median of each stage's own time is the planted one, and all rows sum to the latency."""
    report = loaded(served, path, tmp_path)

    assert report.total is not None
    for stage, planted in PLANTED[path].items():
        found = own(report, stage)
        margin = max(0.25 * planted, 2.0)
        print(f"{path} {stage}: planted {planted}, own p50 {found.p50_ms:.2f}, "
              f"mean {found.mean_ms:.2f} ({found.low_ms:.2f} to {found.high_ms:.2f})")  # fmt: skip
        assert planted - margin <= found.p50_ms <= planted + margin
    waits = [wait.mean_ms for wait in report.waits if wait.cause not in ("threadpool", "batch")]
    rows = [part.mean_ms if part.own is None else part.own.mean_ms for part in report.parts]
    assert sum(rows) + sum(waits) == pytest.approx(report.total.mean_ms, rel=1e-9)


def test_who_held_the_loop(served: tuple[int, Path], tmp_path: Path) -> None:
    """Where one stage holds the loop, the report says event loop, and names that stage."""
    report = loaded(served, "headline", tmp_path)

    (wait,) = [wait for wait in report.waits if wait.cause == "event_loop"]
    by_stage = {holder.stage: holder.share for holder in wait.held_by}
    assert max(by_stage, key=lambda stage: by_stage[stage]) == "preprocess"
    assert wait.low_ms <= wait.mean_ms <= wait.high_ms
