"""The agent beside the server of `stagescope run`: a process of its own, that outlives the server.

It has a session of its own, so that Ctrl-C does not reach it: it has to read what the server
wrote last. Where another agent holds the spool, that one reads, and ours takes over if it ends.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stagescope.agent.api.address import parse_address
from stagescope.agent.lock import AGENT, held, holder
from stagescope.agent.samplers import chosen
from stagescope.cli.run_processes import wait_for
from stagescope.errors import EXIT_DONE, EXIT_HELD
from stagescope.recorder.spool import ring_files
from stagescope.settings import METRICS_PORT

STOP_S = 15.0
"""What it gets to read the rest and to flush; its own limits are shorter."""


@dataclass(frozen=True, slots=True)
class AgentOptions:
    """What its command line says; None where it says nothing."""

    spool: Path
    otlp: str | None
    metrics: str | None
    quiet: bool
    samplers: str | None = None

    def words(self) -> list[str]:
        """Return the command line."""
        # -P: not what lies in the server's folder, whatever its name.
        words = [sys.executable, "-P", "-m", "stagescope", "agent"]
        words += ["--quiet"] if self.quiet else []
        words += ["--spool", str(self.spool)]
        words += ["--otlp", self.otlp] if self.otlp else []
        # Only when asked: the server, which starts later, may want the default port itself.
        words += ["--metrics-port", self.metrics or METRICS_PORT.text() or "off"]
        words += ["--samplers", self.samplers] if self.samplers else []
        return words


class AgentBeside:
    """Sees to it that an agent reads the spool while the server runs."""

    def __init__(
        self, options: AgentOptions, before_exec: Callable[[], None], say: Callable[[str], None]
    ) -> None:
        if options.metrics not in (None, "off"):
            parse_address(options.metrics, option="--metrics-port", default_host="127.0.0.1")
        if options.samplers:
            chosen(options.samplers)  # a name that there is not is said before the server starts
        self._options = options
        self._before_exec = before_exec
        self._say = say
        self._process: subprocess.Popen[bytes] | None = None
        self._given_up = False

    @property
    def pids(self) -> set[int]:
        """The agent's pid, if we have started one."""
        return {self._process.pid} if self._process else set()

    def start(self) -> None:
        """Start it, unless another one reads the spool already."""
        if (pid := other_agent(self._options.spool)) is None:
            self._process = self._started()
            return
        unused = [
            option
            for option, value in (
                ("--otlp", self._options.otlp),
                ("--metrics-port", self._options.metrics),
                ("--samplers", self._options.samplers),
            )
            if value
        ]
        ignored = f"; {', '.join(unused)} would be that one's to know" if unused else ""
        self._say(f"agent pid {pid} reads spool {self._options.spool} already{ignored}")

    def look_after(self) -> None:
        """Take over from another agent that has ended; say once if ours has failed."""
        if self._given_up:
            return
        if self._process is None:
            if other_agent(self._options.spool) is None:
                self._process = self._started()
                self._say(f"the other agent has ended; now pid {self._process.pid} reads")
            return
        code = self._process.poll()
        if code == EXIT_HELD:
            self._process = None  # Another was faster; it has said so.
        elif code is not None:
            self._given_up = True
            self._say(
                f"the agent has ended with exit code {code}; the server goes on, and its newest "
                f"records wait in {self._options.spool}"
            )

    def stop(self) -> None:
        """Let it read the rest, and end; at Ctrl-C meanwhile, end it at once."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        process.terminate()
        if wait_for(lambda: process.poll() is not None, STOP_S):
            if process.returncode == -signal.SIGTERM and ring_files(self._options.spool):
                self._read_once()  # The server was so quick that the agent had not come up yet.
            elif process.returncode not in (EXIT_DONE, -signal.SIGTERM):
                self._say(f"the agent has ended with exit code {process.returncode}")
            return
        process.kill()
        process.wait()
        self._say(f"the agent was killed before it had read everything; the rest is in "
                  f"{self._options.spool}")  # fmt: skip

    def _read_once(self) -> None:
        process = self._started("--once")
        if not wait_for(lambda: process.poll() is not None, STOP_S):
            process.kill()
            process.wait()

    def _started(self, *more: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [*self._options.words(), *more],
            stdin=subprocess.DEVNULL,
            stdout=2,  # standard output is the server's
            start_new_session=True,
            preexec_fn=self._before_exec,  # noqa: PLW1509 - there are no threads here
        )


def other_agent(spool: Path) -> int | None:
    """Return the pid of the agent process that holds *spool*; an embedded one yields to ours."""
    if not held(spool):
        return None
    found = holder(spool)
    return int(found["pid"]) if found.get("kind") == AGENT else None
