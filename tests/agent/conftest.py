"""Spools, agents on threads, and agents as processes."""

import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from stagescope.agent.client import AgentClient
from stagescope.agent.loop import Agent
from stagescope.agent.sinks import Sink
from stagescope.errors import StagescopeError
from stagescope.testing import wait_until

SOURCE = Path(__file__).parents[2] / "src"


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool with a path short enough for a socket."""
    with tempfile.TemporaryDirectory(prefix="spool-") as folder:
        yield Path(folder)


@pytest.fixture(autouse=True)
def _own_faults_are_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")


@contextmanager
def _running(spool: Path, **sinks: Sink) -> Iterator[Agent]:
    agent = Agent(spool, sinks)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join()
        agent.close()


@pytest.fixture
def running_agent() -> Callable[..., object]:
    """Give a context in which an agent works on a thread and is stopped cleanly."""
    return _running


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start_process() -> Iterator[Start]:
    """Start `stagescope agent` on a spool and wait until it answers; it is ended with the test."""
    with ExitStack() as cleanup:

        def start(spool: Path, *options: str, answers: bool = True) -> subprocess.Popen[str]:
            process = subprocess.Popen(
                [sys.executable, "-m", "stagescope", "agent", "--spool", str(spool),
                 "--metrics-port", "off", *options],
                env=os.environ | {"PYTHONPATH": str(SOURCE)},
                text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            cleanup.callback(_end, process)
            if answers:
                wait_until(lambda: _answers(spool, process), timeout_s=20)
            return process

        yield start


def _answers(spool: Path, process: subprocess.Popen[str]) -> bool:
    if process.poll() is not None:
        raise AssertionError(f"the agent ended: {process.communicate()}")
    try:
        return bool(AgentClient(spool / "agent.sock").health()["pid"] == process.pid)
    except StagescopeError:
        return False


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
