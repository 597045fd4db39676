"""Loads the planted servers, and holds what the report says against what the servers measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median

from stagescope.analysis.build import build_report
from stagescope.analysis.report import Part, Report
from stagescope.load_run.plan import LoadPlan
from stagescope.load_run.run import execute
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.server_processes import free_port, port_is_free

SERVER = Path(__file__).parent / "server.py"
LOADS = (0.3, 0.8, 1.5, 2.5)
LOOPS = ("asyncio", "uvloop")
DURATION_S = 2.0
TRUTH = "truth.json"
"""In a run's folder: what the server measured, ms by path and stage."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One planted server."""

    path: str
    capacity_per_s: float
    cause: str
    """What requests wait for where there are too many."""
    loose: frozenset[str] = frozenset()
    """Stages that await something outside: beyond 0.8 of capacity only their bounds are exact."""


def _shape(path: str, held_ms: float, cause: str = "event_loop", *loose: str) -> Shape:
    return Shape(path, 1e3 / held_ms, cause, frozenset(loose))


SHAPES = (
    _shape("headline", 18.3),
    _shape("blocking", 18.3),
    _shape("worker_thread", 12.5),
    _shape("to_thread", 12.5),
    _shape("executor", 12.5),
    _shape("few_threads", 6.2, "threadpool"),
    _shape("one_model_lock", 10.4, ""),
    _shape("interpreter_lock", 27, "gil"),
    _shape("answer_queue", 12.5),
    _shape("child_task", 12.3),
    _shape("gathered", 12.4),
    _shape("task_group", 12.4),
    _shape("event", 12.4),
    _shape("in_steps", 16.4),
    _shape("postprocess_holds", 14.3),
    _shape("collections", 25, "event_loop"),
    _shape("outside", 10.8, "event_loop", "inference"),
    _shape("batched", 4.1, "batch"),
)


@dataclass(frozen=True, slots=True)
class Found:
    """One stage of one run: the truth, and what the report says, ms."""

    shape: Shape
    loop: str
    load: float
    stage: str
    true_mean: float
    true_p50: float
    mean: float
    low: float
    high: float
    p50: float

    @property
    def strict(self) -> bool:
        """True where the estimate itself is held against the truth, not just its bounds."""
        return self.stage not in self.shape.loose or self.load <= 0.8

    def within(self, share: float, least_ms: float) -> bool:
        """Return whether own time is the truth but for so much."""
        margin = max(share * self.true_mean, least_ms)
        if not self.strict:
            return self.low - margin <= self.true_mean <= self.high + margin
        p50_margin = max(share * self.true_p50, least_ms)
        return (
            abs(self.mean - self.true_mean) <= margin
            and abs(self.p50 - self.true_p50) <= p50_margin
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one server."""

    shape: Shape
    loop: str
    load: float
    report: Report
    stages: tuple[Found, ...]

    @property
    def waited_ms(self) -> float:
        """The truth: what requests spent on the server beyond their stages' own times."""
        assert self.report.total is not None
        outer = sum(
            part.mean_ms
            for part in self.report.parts
            if part.name in ("client_wait", "connect", "unexplained")
        )
        return self.report.total.mean_ms - outer - sum(stage.true_mean for stage in self.stages)

    def wait_ms(self, cause: str) -> float:
        """Return the mean wait for *cause*."""
        return sum(wait.mean_ms for wait in self.report.waits if wait.cause == cause)

    @property
    def machine_ms(self) -> float:
        """What the machine took: waits for a core."""
        return self.wait_ms("cpu")

    @property
    def network_ms(self) -> float:
        """The network's own mean."""
        part = self.report.part("network")
        assert part is not None
        return part.mean_ms if part.own is None else part.own.mean_ms


@contextmanager
def served(loop: str) -> Iterator[tuple[int, Path]]:
    """Run the server on *loop*, with an agent beside it; yield its port and its spool."""
    port = free_port()
    with short_spool() as spool, AgentProcesses() as agents:
        agents(spool)
        with subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--loop",
             loop, "--log-level", "warning", "--no-access-log", "--backlog", "2048"],
            cwd=SERVER.parent, env=os.environ | {"STAGESCOPE_SPOOL": str(spool)},
        ) as server:  # fmt: skip
            try:
                wait_until(lambda: not port_is_free(port), 30)
                yield port, spool
            finally:
                server.kill()


def _get(port: int, path: str) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/{path}", timeout=30) as answer:
        body: bytes = answer.read()
        return body


def outcome(
    served: tuple[int, Path], loop: str, shape: Shape, load: float, folder: Path
) -> Outcome:
    """Load one path at *load* times its capacity, and hold the report against the truth."""
    port, spool = served
    for _ in range(3):
        _get(port, shape.path)
    _get(port, "truth")
    plan = LoadPlan(
        rate_per_s=load * shape.capacity_per_s, duration_s=DURATION_S, warmup_s=0.0,
        out=folder, spool=spool,
    )  # fmt: skip
    execute(plan, f"http://127.0.0.1:{port}/{shape.path}")
    told = json.loads(_get(port, "truth"))
    (folder / TRUTH).write_text(json.dumps(told))
    return held_against_truth(loop, shape, load, folder)


def held_against_truth(loop: str, shape: Shape, load: float, folder: Path) -> Outcome:
    """Report on a run folder of `outcome`, and hold that against the truth beside it."""
    report = build_report(folder)
    told = json.loads((folder / TRUTH).read_text())
    stages = []
    for key, times in told.items():
        path, _, stage = key.partition(" ")
        if path == shape.path:
            part = report.part(stage)
            assert part is not None
            stages.append(_found(shape, loop, load, stage, times, part))
    return Outcome(shape, loop, load, report, tuple(stages))


def _found(
    shape: Shape, loop: str, load: float, stage: str, truth: list[float], part: Part
) -> Found:
    own = part.own
    assert own is not None, f"{shape.path}: no waits were measured"
    return Found(
        shape, loop, load, stage, fmean(truth), median(truth),
        own.mean_ms, own.low_ms, own.high_ms, own.p50_ms,
    )  # fmt: skip


CAUSES = ("event_loop", "gil", "gc", "cpu", "threadpool", "batch", "stopped")


def lines(one: Outcome) -> Iterator[str]:
    """Yield the lines of the table for one run."""
    total = one.report.total
    assert total is not None
    client = one.report.client
    waits = " ".join(f"{cause} {ms:.2f}" for cause in CAUSES if (ms := one.wait_ms(cause)) >= 0.005)
    network = one.report.part("network")
    assert network is not None
    sides = " ".join(f"{p.name[8:]} {p.own.mean_ms:.2f}" for p in network.inner if p.own)
    yield (
        f"{one.shape.path} {one.loop} {one.load} ({client.answered} of {client.planned}, "
        f"{total.mean_ms:.1f} ms): waited {one.waited_ms:.2f}: {waits}; network "
        f"{one.network_ms:.2f} ({sides}) other "
        + " ".join(
            f"{p.name} {p.own.mean_ms:.2f}"
            for p in one.report.parts
            if p.own and p.recorded and p.own.mean_ms > 0.2
            and p.name not in {stage.stage for stage in one.stages} | {"network"}
        )
    )  # fmt: skip
    for stage in one.stages:
        ok = "ok " if stage.within(0.15, 1.0) else "OFF"
        yield (
            f"    {ok} {stage.stage:12} true mean {stage.true_mean:7.2f} p50 {stage.true_p50:7.2f}"
            f" | own mean {stage.mean:7.2f} ({stage.low:.2f} to {stage.high:.2f})"
            f" p50 {stage.p50:7.2f}"
        )
