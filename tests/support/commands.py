"""`stagescope run` as people use it: a real process, with what it prints in a file."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stagescope.testing import wait_until

SOURCE = Path(__file__).parents[2] / "src"
LISTENS = re.compile(r"(?:on|at):? (?:http://)?127\.0\.0\.1:([1-9]\d*)")
"""How uvicorn, gunicorn and hypercorn say where."""
END_S = 60.0


@dataclass(frozen=True, slots=True)
class Running:
    """A command under `stagescope run`."""

    process: subprocess.Popen[bytes]
    output: Path

    def text(self) -> str:
        """Return what it has printed so far, on both streams."""
        return self.output.read_text("utf-8", "replace")

    def wait_for(self, text: str) -> str:
        """Wait until it has printed *text*, and give all that it has printed."""
        wait_until(lambda: text in self.text() or self.process.poll() is not None, END_S)
        assert text in self.text(), self.text()
        return self.text()

    def port(self) -> int:
        """Wait until the server says on which port it listens, and does."""
        wait_until(lambda: LISTENS.search(self.text()) or self.process.poll() is not None, END_S)
        found = LISTENS.search(self.text())
        assert found, self.text()
        port = int(found[1])
        wait_until(lambda: _listens(port) or self.process.poll() is not None, END_S)
        return port

    def end(self, number: int = signal.SIGTERM) -> int:
        """Signal it, wait, and give its exit code."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """Wait for its end, and give its exit code."""
        return self.process.wait(END_S)


def _listens(port: int) -> bool:
    # With workers uvicorn names the port before the first of them listens.
    try:
        socket.create_connection(("127.0.0.1", port), END_S).close()
    except ConnectionRefusedError:
        return False
    return True


@contextmanager
def run_command(
    folder: Path,
    *words: str,
    environment: Mapping[str, str] | None = None,
    name: str = "output.txt",
    stdin: int = subprocess.DEVNULL,
) -> Generator[Running]:
    """Start `stagescope run` with *words* in *folder*; it is ended with the block."""
    output = folder / name
    behind = (environment or {}).get("PYTHONPATH")
    path = os.pathsep.join([str(SOURCE), *([behind] if behind else [])])
    with output.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "stagescope", "run", *words],
            cwd=folder,
            env=os.environ | (environment or {}) | {"PYTHONPATH": path},
            stdin=stdin,
            stdout=file,
            stderr=file,
        )
    try:
        yield Running(process, output)
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def ask(port: int, trace_id: str, *, run_id: str = "") -> int:
    """Send one request of a known trace, on a connection of its own; returns the status."""
    headers = {"traceparent": f"00-{trace_id}-00f067aa0ba902b7-01"}
    if run_id:
        headers["baggage"] = f"stagescope.run={run_id}"
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=END_S)
    try:
        connection.request("GET", "/", headers=headers)
        response = connection.getresponse()
        response.read()
        return response.status
    finally:
        connection.close()
