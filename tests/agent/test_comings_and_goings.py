"""Servers come and go under a real agent with all samplers: nothing of theirs stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.recorder.spool import SOCKET_NAME
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses

TIMES = 20

SERVED = """
import sys, time
from pathlib import Path
from stagescope import stage
from stagescope.recorder import format as fmt
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recording.timeline import Timeline, current

recorder = process_recorder(Path(sys.argv[1]), "coming")
print("ready", flush=True)
number = 0
while True:  # requests of a load run, so that stacks are sampled
    number += 1
    ids = number.to_bytes(16, "big"), number.to_bytes(8, "big")
    timeline = Timeline(recorder, fmt.KIND_REQUEST, recorder.clock(), *ids, run=b"coming")
    token = current.set(timeline)
    with stage("preprocess"):
        until = time.monotonic() + 0.01
        while time.monotonic() < until:
            sum(range(1000))
    current.reset(token)
    timeline.finish(recorder.clock(), 0, 0, 0, 0, 0, 200, b"", b"")
"""


def held(agent: psutil.Process) -> dict[str, int]:
    """Count what an agent holds."""
    with agent.oneshot():
        return {
            "threads": agent.num_threads(),
            "files": agent.num_fds(),
            "children": len(agent.children(recursive=True)),
        }


def test_twenty_servers_leave_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every other one is killed; the agent then holds no more than after the first two."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    with short_spool() as spool, AgentProcesses() as agents:
        process = agents(spool)
        agent, client = psutil.Process(process.pid), AgentClient(spool / SOCKET_NAME)
        for number in range(TIMES):
            with subprocess.Popen(
                [sys.executable, "-c", SERVED, str(spool)], stdout=subprocess.PIPE,
                env=os.environ | {"STAGESCOPE_AGENT": "off"},
            ) as server:  # fmt: skip
                assert server.stdout is not None
                assert server.stdout.readline() == b"ready\n"
                wait_until(lambda: client.counters()["rings"] == 1, timeout_s=20)
                before = client.counters()["samples"]
                wait_until(lambda: client.counters()["samples"] > before + 20, timeout_s=20)  # noqa: B023
                server.kill() if number % 2 else server.terminate()
            wait_until(lambda: client.counters()["rings"] == 0, timeout_s=20)
            if number == 1:
                wait_until(lambda: not agent.children(), timeout_s=20)
                settled = held(agent)
        wait_until(
            lambda: all(held(agent)[what] <= settled[what] for what in settled), timeout_s=30
        )
        assert not [path.name for path in spool.iterdir() if path.suffix in (".ring", ".probe")]
        assert client.counters()["faults"] == 0
        process.terminate()
        assert process.wait(20) == 0
    assert not [path.name for path in tmp_path.iterdir() if not path.name.startswith("spool-")]
