"""`stagescope run --samplers`: the agent beside the server samples what it is told to."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.api.client import AgentClient
from stagescope.agent.overhead import COLLECTOR_CPU_TIME
from stagescope.errors import StagescopeError
from stagescope.recorder.spool import SOCKET_NAME
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.commands import run_command

WAITS = [sys.executable, "-c", "import time; time.sleep(60)"]


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool of the test's own."""
    with short_spool() as made:
        yield made


def agent_of(spool: Path) -> tuple[AgentClient, int] | None:
    """Return a client of the agent that answers there, and its pid."""
    client = AgentClient(spool / SOCKET_NAME)
    try:
        return client, int(client.health()["pid"])
    except StagescopeError:
        return None


def test_the_agent_is_told_and_samples(tmp_path: Path, spool: Path) -> None:
    """Its command line has the names, and its samples can be asked for while the server runs."""
    options = ["--spool", str(spool), "--metrics-port", "off", "--samplers", "off", "--"]
    with run_command(tmp_path, *options, *WAITS):
        found = wait_until(lambda: agent_of(spool), timeout_s=30)
        assert found
        client, pid = found
        words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        names = wait_until(lambda: {sample.name for sample in client.samples()})

    assert words[words.index("--samplers") + 1] == "off"
    assert COLLECTOR_CPU_TIME in names
    assert all(name.startswith("stagescope.") for name in names), "the agent's own cost alone"


def test_a_name_that_there_is_not_starts_nothing(tmp_path: Path, spool: Path) -> None:
    """Exit code 2 and one sentence, before the server."""
    options = ["--spool", str(spool), "--samplers", "weather", "--"]
    with run_command(tmp_path, *options, sys.executable, "-c", "print('started')") as running:
        assert running.wait() == 2

    assert "there is no sampler 'weather'" in running.text()
    assert "started" not in running.text()
