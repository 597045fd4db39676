"""The demo's server process: the example app on a socket that the demo has bound.

`python -m stagescope.cli.demo_child FD`. Its standard input is a pipe from the demo, which never
writes: its end means that the demo has finished, or was killed, and the server leaves too.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import threading
import time
from types import FrameType

APP = "stagescope.examples.torch_server.app:app"
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
        shutil.rmtree(os.environ["STAGESCOPE_SPOOL"], ignore_errors=True)


def _serve() -> None:
    threading.Thread(target=_leave_with_the_demo, daemon=True).start()
    listener = socket.socket(fileno=int(sys.argv[1]))

    import uvicorn

    config = uvicorn.Config(APP, lifespan="on", access_log=False, timeout_graceful_shutdown=GRACE_S)
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
