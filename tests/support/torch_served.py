"""A real torch server in a process of its own, under a light load: for tests of captures."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from stagescope.recorder.spool import ring_files
from stagescope.testing import wait_until
from tests.support.server_processes import free_port

APP = "stagescope.examples.torch_server.app:app"
SMALL = {"IMAGE_SERVER_WIDTH": "4", "IMAGE_SERVER_IMAGE_SIDE": "32"}


@dataclass(slots=True)
class TorchServed:
    """The server; `load` sends requests for as long as its block lasts."""

    process: subprocess.Popen[bytes]
    port: int
    spool: Path
    log: Path
    answers: list[int] = field(default_factory=list[int])
    """Status of each answer, newest last; 0 where none came."""

    @property
    def ring(self) -> Path:
        """Its recorder file."""
        (found,) = ring_files(self.spool)
        return found

    @contextmanager
    def load(self, clients: int = 2) -> Iterator[None]:
        """Send one request after the other with each of *clients*, from the first answer on."""
        from stagescope.examples.image_server.images import sample_jpeg

        stop, body = threading.Event(), sample_jpeg(64, 64)
        threads = [
            threading.Thread(target=self._send, args=(stop, body), name=f"client-{number}")
            for number in range(clients)
        ]
        before = len(self.answers)
        for thread in threads:
            thread.start()
        try:
            wait_until(lambda: len(self.answers) > before, 20)
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join(20)

    def _send(self, stop: threading.Event, body: bytes) -> None:
        while not stop.is_set():
            self.answers.append(_post(self.port, body))
            time.sleep(0.005)


def _post(port: int, body: bytes) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("POST", "/predict", body)
        response = connection.getresponse()
        response.read()
        return response.status
    except (OSError, http.client.HTTPException):
        return 0
    finally:
        connection.close()


@contextmanager
def torch_served(folder: Path) -> Iterator[TorchServed]:
    """Start the example server with its spool in *folder*; it is ended with the block."""
    spool, log, port = folder / "spool", folder / "server.log", free_port()
    spool.mkdir()
    words = [sys.executable, "-m", "uvicorn", "--log-level", "warning", "--port", str(port), APP]
    with log.open("wb") as output:
        process = subprocess.Popen(
            words, stdout=output, stderr=output, env=os.environ | SMALL | {"STAGESCOPE_SPOOL": str(spool)}
        )  # fmt: skip
    served = TorchServed(process, port, spool, log)
    try:
        wait_until(lambda: _up(port) or process.poll() is not None, 60)
        assert process.poll() is None, log.read_text()
        yield served
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(20)
        process.kill()
        process.wait()


def _up(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().read() != b""
    except OSError:
        return False
    finally:
        connection.close()
