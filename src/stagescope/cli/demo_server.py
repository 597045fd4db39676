"""The example server as a child process: started, waited for, and never left behind."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from stagescope import settings
from stagescope.errors import StagescopeError

READY_TIMEOUT_S = 60.0
DRAIN_TIMEOUT_S = 30.0
STOP_TIMEOUT_S = 10.0
HEALTH_TIMEOUT_S = 5.0
POLL_S = 0.05
LOG_LINES = 15

ONNX_APP = "stagescope.examples.image_server.onnx:app"
TORCH_APP = "stagescope.examples.torch_server.app:app"


@dataclass(frozen=True, slots=True)
class ExampleServer:
    """A running server; `spool` is its own, with the embedded agent's socket in it."""

    process: subprocess.Popen[bytes]
    port: int
    spool: Path
    log: Path

    @property
    def url(self) -> str:
        """Where to post images."""
        return f"http://127.0.0.1:{self.port}/predict"

    def wait_ready(self, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """Wait until the model is warm and return the server's health.

        Raises StagescopeError, with the server's last words, where that does not come to be.
        """
        deadline = time.monotonic() + timeout_s
        while (health := self.health()) is None:
            self.check_alive()
            if time.monotonic() > deadline:
                raise StagescopeError(self._with_log(f"no answer after {timeout_s:.0f} s"))
            time.sleep(POLL_S)
        return health

    def wait_drained(self, timeout_s: float = DRAIN_TIMEOUT_S) -> None:
        """Wait until no request waits for the model, so that a run starts from rest."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            health = self.health()
            if health is not None and health["waiting"] == 0:
                return
            self.check_alive()
            time.sleep(POLL_S)
        raise StagescopeError(self._with_log(f"its queue is not empty after {timeout_s:.0f} s"))

    def health(self) -> dict[str, Any] | None:
        """Ask `/healthz`; None where there is no answer, or not yet a good one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HEALTH_TIMEOUT_S)
        try:
            connection.request("GET", "/healthz")
            response = connection.getresponse()
            body = response.read()
        except (OSError, http.client.HTTPException):
            return None
        finally:
            connection.close()
        return json.loads(body) if response.status == 200 else None

    def check_alive(self) -> None:
        """Raise StagescopeError, with the server's last words, where it has ended."""
        code = self.process.poll()
        if code is not None:
            raise StagescopeError(self._with_log(f"it ended with exit code {code}"))

    def _with_log(self, what: str) -> str:
        lines = self.log.read_text("utf-8", "replace").splitlines()[-LOG_LINES:]
        said = "\n  ".join(lines or ["(nothing)"])
        return f"the example server: {what}; {self.log} ends with\n  {said}"


@contextmanager
def example_server(log: Path, app: str = ONNX_APP) -> Generator[ExampleServer]:
    """Start the example *app* on a free loopback port; stop it when the block is left."""
    with (
        # Short and in the system's own place: the path of a Unix socket has about 100 bytes.
        tempfile.TemporaryDirectory(prefix="stagescope-", ignore_cleanup_errors=True) as spool,
        log.open("wb") as output,
    ):
        process, port = _start(Path(spool), output.fileno(), app)
        try:
            yield ExampleServer(process, port, Path(spool), log)
        finally:
            _stop(process)


def _start(spool: Path, output: int, app: str) -> tuple[subprocess.Popen[bytes], int]:
    # Bound here, so the port is known and ours; the child listens when it is ready, and once it
    # holds the only copy, its death refuses connections instead of letting them hang.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        fd = listener.fileno()
        process = subprocess.Popen(
            [sys.executable, "-m", "stagescope.cli.demo_server", str(fd), app],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            pass_fds=[fd],
            process_group=0,  # Ctrl-C is for the demo, which then ends the child in order
            env=os.environ | {settings.SPOOL.name: str(spool)},
        )
        port: int = listener.getsockname()[1]
        return process, port


def _stop(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# The demo's server process: the example app on a socket that the demo has bound.
#
# `python -m stagescope.cli.demo_server FD APP`. Its standard input is a pipe from the demo, which never
# writes: its end means that the demo has finished, or was killed, and the server leaves too.


GRACE_S = 3
"""What requests in flight get to finish in, once the server has to leave."""


def main() -> None:
    """Serve until the demo is gone; exit code 3 where the app did not start."""
    # uvicorn gives the signal back when it has shut down; as an exit, it runs what is below.
    signal.signal(signal.SIGTERM, _exit)
    try:
        _serve()
    finally:
        # The demo does it too; but a demo that was killed does nothing.
        shutil.rmtree(settings.SPOOL.text(), ignore_errors=True)


def _serve() -> None:
    threading.Thread(target=_leave_with_the_demo, daemon=True).start()
    listener = socket.socket(fileno=int(sys.argv[1]))

    import uvicorn

    config = uvicorn.Config(
        sys.argv[2], lifespan="on", access_log=False, timeout_graceful_shutdown=GRACE_S
    )
    server = uvicorn.Server(config)
    server.run(sockets=[listener])
    if not server.started:
        sys.exit(3)


def _exit(number: int, frame: FrameType | None) -> None:
    sys.exit()


def _leave_with_the_demo() -> None:
    os.read(sys.stdin.fileno(), 1)  # unbuffered: nothing to lock when the interpreter ends
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(2 * GRACE_S)
    os._exit(1)  # the model is still busy; nobody waits for it any more


if __name__ == "__main__":
    main()
