"""What the agent sampled while a run lasted stands in the run's folder."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from stagescope import load_run, stage
from stagescope.agent.api.client import AgentClient
from stagescope.agent.api.control import Control, listen, serve_socket
from stagescope.agent.api.http_server import Reply, Request, problem
from stagescope.agent.loop import Agent
from stagescope.agent.overhead import COLLECTOR_CPU_TIME
from stagescope.analysis.sources import open_run, rows
from stagescope.embedded import start_embedded_agent
from stagescope.load_run import LoadPlan, run_load
from stagescope.load_run.collect import MARGIN_NS
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.types import Receive, Scope, Send
from stagescope.recorder.spool import SOCKET_NAME
from stagescope.runfolder.run import read_run
from stagescope.runfolder.schema import EVIDENCE
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses, running_agent
from tests.support.evidence import kernel, sample, stack
from tests.support.serving import served

SOURCES = Path(__file__).parents[2] / "src"
HOUR_NS = 3600 * 10**9


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, with a stage in it."""
    await receive()
    with stage("inference"):
        body = b"ok"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool with room for a socket's name; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


@pytest.fixture
def url(spool: Path) -> Iterator[str]:
    """A real server whose records go to the spool."""
    with served(StageMiddleware(app, spool=spool), lifespan="off") as port:
        yield f"http://127.0.0.1:{port}/"


@contextmanager
def agent_here(spool: Path) -> Iterator[Agent]:
    """An agent on a thread of this process that answers on the spool's socket."""
    with running_agent(spool) as agent:
        server = serve_socket(Control(agent, "agent", spool))
        try:
            yield agent
        finally:
            server.stop()


def table(folder: Path, name: str) -> list[dict[str, Any]]:
    """Read a table of a run folder."""
    found: list[dict[str, Any]] = pq.read_table(folder / f"{name}.parquet").to_pylist()
    return found


def window_of(folder: Path) -> tuple[int, int]:
    """Return when the first request of the server's side began and the last one ended."""
    server = table(folder, "server")
    return (
        min(row["start_ns"] for row in server),
        max(row["start_ns"] + row["duration_ns"] for row in server),
    )


def test_a_load_run_holds_the_samples_of_its_time(spool: Path, url: str, tmp_path: Path) -> None:
    """`stagescope load` with a real agent process: the agent's own cost, until the run's end."""
    out = tmp_path / "run"
    with AgentProcesses() as start:
        start(spool)
        done = subprocess.run(
            [sys.executable, "-m", "stagescope", "load", url, "--rate", "100", "--duration", "1.5",
             "--warmup", "0.2", "--spool", str(spool), "--out", str(out), "--format", "json"],
            env=os.environ | {"PYTHONPATH": str(SOURCES)},
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
    assert done.returncode in (0, 2), done.stderr  # 2: this machine was too busy to drive in time
    assert json.loads(done.stdout)
    since_ns, until_ns = window_of(out)
    own = [row for row in table(out, "samples") if row["name"] == COLLECTOR_CPU_TIME]

    assert {"discover", "own_cost", "other"} <= {row["detail"] for row in own}
    assert {(row["unit"], row["kind"], row["pid"]) for row in own} == {("s", "amount", 0)}
    assert sum(row["value"] for row in own) > 0
    assert max(row["end_ns"] for row in own) >= until_ns
    assert all(row["end_ns"] >= since_ns - MARGIN_NS for row in own)
    assert all(row["start_ns"] <= until_ns + MARGIN_NS for row in own)
    assert {row["pid"] for row in table(out, "stacks")} <= {os.getpid()}
    assert table(out, "kernels") == []


def test_stacks_and_kernels_of_the_runs_time_are_in_it(
    spool: Path, url: str, tmp_path: Path
) -> None:
    """What overlaps the requests is in the folder and can be opened; what came earlier is not."""
    with agent_here(spool) as agent:
        now_ns = time.monotonic_ns()
        during = {"start_ns": now_ns, "end_ns": now_ns + HOUR_NS}
        agent.evidence.stacks.add([stack(), stack(**during)])
        agent.evidence.kernels.add([kernel(), kernel(**during)])
        agent.evidence.samples.add([sample(device="GPU-1"), sample(device="GPU-1", **during)])
        folder = load_run(
            url, rate_per_s=100, duration_s=0.5, warmup_s=0.0, out=tmp_path / "run", spool=spool
        )
    tables = open_run(folder)
    stacks, kernels, samples = map(rows, (tables.stacks, tables.kernels, tables.samples))
    tables.backend.disconnect()

    assert [row["start_ns"] for row in stacks] == [now_ns]
    assert stacks[0]["frames"][1] == "decode (/srv/images.py:40)"
    assert [(row["capture_id"], row["kind"]) for row in kernels] == [("c-1", "kernel")]
    assert [row["start_ns"] for row in samples if row["device"]] == [now_ns]


def test_an_embedded_agent_gives_samples_too(spool: Path, url: str, tmp_path: Path) -> None:
    """The agent on a thread of the server, which nobody had to start."""
    agent = start_embedded_agent(spool)
    try:
        wait_until((spool / SOCKET_NAME).exists)
        folder = load_run(
            url, rate_per_s=100, duration_s=0.4, warmup_s=0.0, out=tmp_path / "run", spool=spool
        )
    finally:
        agent.stop()
    own = [row for row in table(folder, "samples") if row["name"] == COLLECTOR_CPU_TIME]

    assert {"discover", "other"} <= {row["detail"] for row in own}
    assert max(row["end_ns"] for row in own) >= window_of(folder)[1]


def test_an_interrupted_run_has_its_samples_too(spool: Path, url: str, tmp_path: Path) -> None:
    """Ctrl-C: the folder holds the samples of the time until then."""
    out = tmp_path / "run"
    with AgentProcesses() as start:
        start(spool)
        process = subprocess.Popen(
            [sys.executable, "-m", "stagescope", "load", url, "--rate", "100", "--duration", "60",
             "--warmup", "0", "--spool", str(spool), "--out", str(out)],
            env=os.environ | {"PYTHONPATH": str(SOURCES)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        client = AgentClient(spool / SOCKET_NAME)
        wait_until(lambda: client.counters()["records"] > 20, timeout_s=30)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert read_run(out).interrupted, errors
    _, until_ns = window_of(out)
    assert max(row["end_ns"] for row in table(out, "samples")) >= until_ns


def test_an_older_agent_costs_a_sentence_and_the_tables(
    spool: Path, url: str, tmp_path: Path
) -> None:
    """An agent that knows no samples: the run is as valid as before, and says what it lacks."""
    with running_agent(spool) as agent:
        control = Control(agent, "agent", spool)

        def older(request: Request) -> Reply:
            if request.path.strip("/") in ("samples", "stacks", "kernels"):
                return problem(404, "nothing the agent knows")
            return control.answer(request)

        server = listen(("127.0.0.1", 0), older)
        plan = LoadPlan(
            rate_per_s=100, duration_s=0.4, warmup_s=0, out=tmp_path / "run",
            spool=tmp_path, agent_url=f"http://127.0.0.1:{server.port}", token="any",
        )  # fmt: skip
        folder = run_load(plan, url)
        server.stop()

    assert folder.run.server_source == "remote agent"
    assert not any("incomplete" in reason for reason in folder.run.invalid_reasons)
    (sentence,) = folder.notes
    assert sentence.startswith("this run has no samples, stacks and kernels: the agent at http")
    assert sentence.endswith("has no samples to give: it is older than this stagescope")
    assert not any((folder.path / evidence.file_name).exists() for evidence in EVIDENCE)
    assert table(folder.path, "server")
