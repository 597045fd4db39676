"""Agents to test against: on a thread of this process, and as processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from stagescope.agent.api.client import AgentClient
from stagescope.agent.loop import Agent
from stagescope.agent.sinks import Sink
from stagescope.errors import StagescopeError
from stagescope.recorder.spool import SOCKET_NAME
from stagescope.testing import wait_until

_SOURCE = Path(__file__).parents[2] / "src"


@contextmanager
def running_agent(spool: Path, **sinks: Sink) -> Generator[Agent]:
    """An agent that works on a thread, and is stopped cleanly."""
    agent = Agent(spool, sinks)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join()
        agent.close()


class AgentProcesses:
    """Starts `stagescope agent` processes; a `with` block ends those that still run."""

    def __init__(self) -> None:
        self._cleanup = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cleanup.close()

    def __call__(self, spool: Path, *options: str, answers: bool = True) -> subprocess.Popen[str]:
        """Start one on *spool*, without a metrics port; wait until it *answers*."""
        process = subprocess.Popen(
            [sys.executable, "-m", "stagescope", "agent", "--spool", str(spool),
             "--metrics-port", "off", *options],
            env=os.environ | {"PYTHONPATH": str(_SOURCE)},
            text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._cleanup.callback(_end, process)
        if answers:
            wait_until(lambda: _answers(spool, process), timeout_s=20)
        return process


def _answers(spool: Path, process: subprocess.Popen[str]) -> bool:
    if process.poll() is not None:
        raise AssertionError(f"the agent ended: {process.communicate()}")
    try:
        return bool(AgentClient(spool / SOCKET_NAME).health()["pid"] == process.pid)
    except StagescopeError:
        return False


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()
