"""Starts a planted server, loads it, and holds the verdict against what was planted."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from stagescope.analysis.build import build_report
from stagescope.analysis.verdict.model import Verdict
from stagescope.load_run.plan import LoadPlan
from stagescope.load_run.run import execute
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.planted.shapes import Shape
from tests.support.agents import AgentProcesses
from tests.support.server_processes import free_port, port_is_free

HERE = Path(__file__).parent
OUTSIDE = HERE.parent / "planted_time" / "outside.py"
DURATION_S = 4.0
LEAST_REQUESTS = 150
"""A run of fewer than 100 is INVALID, and chance makes some of these fewer."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """One run of one planted server."""

    shape: Shape
    strength: int
    verdict: Verdict

    @property
    def kind_right(self) -> bool:
        """The kind is one that was planted."""
        return self.verdict.kind in self.shape.kinds

    @property
    def right(self) -> bool:
        """Kind and stage are right."""
        stages = self.shape.stages
        return self.kind_right and (not stages or self.verdict.stage in stages)

    @property
    def wrong_and_confident(self) -> bool:
        """It says something else, and is sure of it."""
        return not self.kind_right and self.verdict.confidence == "high"


@contextmanager
def _process(*command: str) -> Iterator[int]:
    """Run what prints its port, and yield that; its end of input ends it."""
    with subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextmanager
def _neighbours(count: int) -> Iterator[None]:
    spin = "while True: pass"
    others = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@contextmanager
def _hogs(count: int) -> Iterator[None]:
    """Compute in *count* threads of this process, which is the driver's."""
    ended = threading.Event()

    def compute() -> None:
        while not ended.is_set():
            sum(range(2000))

    threads = [threading.Thread(target=compute) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@contextmanager
def _stops(pid: int, length_s: float) -> Iterator[None]:
    """Stop *pid* twice a run."""
    ended = threading.Event()

    def stop() -> None:
        while not ended.wait(1.2):
            os.kill(pid, signal.SIGSTOP)
            ended.wait(length_s)
            os.kill(pid, signal.SIGCONT)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        os.kill(pid, signal.SIGCONT)


@contextmanager
def served() -> Iterator[tuple[int, Path, int]]:
    """Run a server with an agent beside it; yield its port, its spool and its pid."""
    port = free_port()
    with short_spool() as spool, AgentProcesses() as agents, _process(str(OUTSIDE)) as outside:
        agents(spool)
        environment = os.environ | {
            "STAGESCOPE_SPOOL": str(spool), "PLANTED_OUTSIDE": str(outside),
        }  # fmt: skip
        with subprocess.Popen(
            [sys.executable, "-m", "uvicorn", "server:app", "--port", str(port), "--log-level",
             "critical", "--no-access-log", "--backlog", "2048"],
            cwd=HERE, env=environment,
        ) as server:  # fmt: skip
            try:
                wait_until(lambda: not port_is_free(port), 30)
                yield port, spool, server.pid
            finally:
                server.kill()


def outcome(shape: Shape, strength: int, folder: Path, seed: int = 0) -> Outcome:
    """Start *shape*, load it at one strength, and judge the run."""
    asked = shape.strengths[strength]
    with served() as (port, spool, pid), ExitStack() as planted:
        url = f"http://127.0.0.1:{port}/{shape.path}?x={asked.x:g}"
        for _ in range(5):
            with suppress(urllib.error.HTTPError):
                urllib.request.urlopen(
                    url if shape.warm else f"http://127.0.0.1:{port}/healthz", timeout=30
                ).read()
        if shape.delays_ms or shape.read_bytes_per_s:
            delay = shape.delays_ms[strength] if shape.delays_ms else 0
            rate = shape.read_bytes_per_s[strength] if shape.read_bytes_per_s else 0
            through = planted.enter_context(
                _process(str(HERE / "proxy.py"), str(port), str(delay), str(rate))
            )
            url = url.replace(str(port), str(through))
        if shape.neighbours:
            planted.enter_context(_neighbours(shape.neighbours[strength]))
        if shape.stops:
            planted.enter_context(_stops(pid, 0.3 * (strength + 1)))
        if shape.hogs:
            planted.enter_context(_hogs(shape.hogs[strength]))
        duration = max(DURATION_S, LEAST_REQUESTS / asked.rate_per_s)
        plan = LoadPlan(
            rate_per_s=asked.rate_per_s, duration_s=duration, warmup_s=0.0, seed=seed,
            out=folder, spool=spool,
        )  # fmt: skip
        path = execute(plan, url).path
    return Outcome(shape, strength, build_report(path).verdict)
