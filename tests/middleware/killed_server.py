"""Started by test_kill: forks one real uvicorn for each line on stdin, tells its pid and port.

Forking saves fifty imports of uvicorn; each server opens its own recorder file after the fork.
"""

import asyncio
import gc
import os
import signal
import socket
import sys
from typing import Any

import uvicorn

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.stage import stage

MANY = 80
"""Openings in a long request: its timeline fills three slots."""


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Answer in two chunks, with a stage around each thing; `/many` opens many more."""
    if scope["type"] == "lifespan":
        return await lifespan(receive, send)
    with stage("preprocess"):
        while (await receive()).get("more_body"):
            pass
    for _ in range(MANY if scope["path"].startswith("/many") else 0):
        with stage("preprocess.parse"):
            pass
    with stage("inference"):
        await asyncio.sleep(0.001)
    head = {"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"6")]}
    await send(head)
    await send({"type": "http.response.body", "body": b"one", "more_body": True})
    with stage("postprocess"):
        await asyncio.sleep(0.001)
    await send({"type": "http.response.body", "body": b"two"})


async def lifespan(receive: Any, send: Any) -> None:
    """Start, and never end in order."""
    await receive()
    await send({"type": "lifespan.startup.complete"})
    await receive()


def serve(spool: str, http: str, listener: socket.socket) -> None:
    """Be a server until killed."""
    wrapped = StageMiddleware(app, "killed", spool)
    uvicorn.Server(uvicorn.Config(wrapped, http=http, log_config=None)).run([listener])


def main() -> None:
    """Fork a server for each line `SPOOL HTTP`."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # The kernel reaps.
    gc.freeze()
    for line in sys.stdin:
        spool, http = line.split()
        with socket.create_server(("127.0.0.1", 0)) as listener:
            pid = os.fork()
            if pid == 0:
                sys.stdin.close()
                serve(spool, http, listener)
                os._exit(1)
            print(pid, listener.getsockname()[1], flush=True)


if __name__ == "__main__":
    main()
