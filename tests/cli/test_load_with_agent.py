"""A load run joined with what an agent has: of this host, of another, and of none that answers."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pyarrow.parquet as pq
import pytest

from stagescope import load_run, stage
from stagescope.analysis.build import build_report
from stagescope.cli import main
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.types import Receive, Scope, Send
from stagescope.runfolder.run import read_run
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.serving import served


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer, with a stage in it."""
    await receive()
    with stage("inference"):
        body = b"ok"
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool with room for a socket's name."""
    with short_spool() as folder:
        yield folder


@pytest.fixture
def agents() -> Iterator[AgentProcesses]:
    """Starts agents and ends them."""
    with AgentProcesses() as start:
        yield start


@pytest.fixture
def url(spool: Path) -> Iterator[str]:
    """A real server whose records go to the spool."""
    with served(StageMiddleware(app, spool=spool), lifespan="off") as port:
        yield f"http://127.0.0.1:{port}/"


def run(url: str, out: Path, **more: Any) -> Path:
    """Load for a moment."""
    return load_run(url, rate_per_s=200, duration_s=0.6, warmup_s=0.1, out=out, **more)


def test_the_agent_of_this_host_gives_every_record(
    spool: Path, agents: AgentProcesses, url: str, tmp_path: Path
) -> None:
    """Each answered request has its server row, exact, on one clock, and the parts sum up."""
    agents(spool)

    folder = run(url, tmp_path / "run", spool=spool)

    report = build_report(folder)
    assert read_run(folder).server_source == "agent"
    assert (report.unmatched.client.total, report.unmatched.server) == (0, 0)
    assert {row["source"] for row in rows(folder)} == {"agent"}
    assert report.client.latency is not None
    total = sum(part.mean_ms for part in report.parts)
    assert total == pytest.approx(report.client.latency.mean_ms, abs=1e-3)


def test_a_remote_agent_gives_the_same_with_its_token(
    spool: Path, agents: AgentProcesses, url: str, tmp_path: Path
) -> None:
    """Over TCP, as from another host: the local spool is empty and is not asked."""
    token = tmp_path / "token"
    token.write_text("secret-of-the-agent\n")
    token.chmod(0o600)
    agent = agents(spool, "--listen", "127.0.0.1:0", "--token-file", str(token))
    where = address(agent.stdout)

    folder = run(
        url, tmp_path / "run", spool=tmp_path, agent_url=where, token="secret-of-the-agent"
    )

    assert read_run(folder).server_source == "remote agent"
    assert build_report(folder).unmatched.server == 0


def test_a_wrong_token_costs_the_agent_and_not_the_run(
    spool: Path, agents: AgentProcesses, url: str, tmp_path: Path
) -> None:
    """The response header steps in, and what was measured is kept."""
    token = tmp_path / "token"
    token.write_text("secret-of-the-agent\n")
    token.chmod(0o600)
    agent = agents(spool, "--listen", "127.0.0.1:0", "--token-file", str(token))
    where = address(agent.stdout)

    with urlopen(url) as answer:  # opens the recorder, by which the run's spool is found
        assert answer.status == 200
    folder = run(url, tmp_path / "run", spool=tmp_path, agent_url=where, token="wrong")

    assert read_run(folder).server_source == "server-timing"
    assert len(rows(folder)) > 0


def address(lines: Any) -> str:
    """Find the URL of the control API in what an agent prints as it starts."""
    for line in lines:
        if "control API at " in line:
            return str(line.split("control API at ")[1].split(",")[0].strip())
    raise AssertionError("the agent told no address")


def rows(folder: Path) -> list[dict[str, Any]]:
    """Read the server's side."""
    found: list[dict[str, Any]] = pq.read_table(folder / "server.parquet").to_pylist()
    return found


def test_the_last_minute_without_a_load_run(
    spool: Path, agents: AgentProcesses, url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`report --live` asks the agent beside a real server; nothing served is exit code 1."""
    agents(spool)
    assert main(["report", "--live", "--spool", str(spool)]) == 1
    assert "no request ended in the last 60 s" in capsys.readouterr().err

    for _ in range(5):
        urllib.request.urlopen(url, timeout=30).read()
    assert main(["report", "--live", "--spool", str(spool)]) == 0
    out = capsys.readouterr().out
    assert "requests/s, 0 errors, last 60 s" in out
    assert "inference" in out

    assert main(["report", "--live", "--spool", str(spool), "--format", "json"]) == 0
    (route,) = json.loads(capsys.readouterr().out)["routes"]
    assert (route["requests"], route["p99_ms"]) == (5, None)
