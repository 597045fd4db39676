"""A real server in a process of its own, and an agent with chosen samplers beside it, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

from stagescope.agent.loop import Agent, Samplers

SOURCE = Path(__file__).parents[2] / "src"
RUN_ID = "sampled"


class ServerProcess:
    """A program that prints its port on its first line; it is killed with the block."""

    def __init__(self, program: Sequence[str | Path], spool: Path, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, *program],
            env=os.environ
            | {"PYTHONPATH": str(SOURCE), "STAGESCOPE_SPOOL": str(spool), "STAGESCOPE_AGENT": "off"}
            | environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout
        self.port = int(self.process.stdout.readline())

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def get(self, path: str) -> None:
        """Ask, as a load run's client does."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", headers={"baggage": f"stagescope.run={RUN_ID}"}
        )
        with urllib.request.urlopen(request, timeout=30) as response:
            response.read()

    def load(self, seconds: float, *paths: str) -> None:
        """Ask for *paths* in turn, one after the other."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for path in paths:
                self.get(path)

    def kill(self) -> None:
        """End it by SIGKILL."""
        self.process.kill()
        self.process.wait()
        if self.process.stdout:
            self.process.stdout.close()


@contextmanager
def serving(program: Sequence[str | Path], spool: Path) -> Generator[ServerProcess]:
    """A server process, killed at the end."""
    server = ServerProcess(program, spool)
    try:
        yield server
    finally:
        server.kill()


@contextmanager
def sampling_agent(spool: Path, samplers: Samplers, *, shared: bool = False) -> Generator[Agent]:
    """An agent with *samplers* on a thread, stopped and closed at the end."""
    agent = Agent(spool, {}, samplers=samplers, shared=shared)
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join()
        agent.close()
