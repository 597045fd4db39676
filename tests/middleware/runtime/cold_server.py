"""Started by test_cold_start: a real uvicorn whose app loads a model at import and at startup.

Arguments: the spool, and at which load it waits for ever (`import`, `startup`, or nowhere: `-`).
"""

import socket
import sys
import threading
from pathlib import Path
from typing import Any

import uvicorn

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.hooks.installer import FrameworkHooks
from stagescope.middleware.stage import stage

SPOOL, WAIT_AT = sys.argv[1:3]


def load(where: str) -> None:
    """Pretend to load, or say so and wait until we are killed."""
    with stage("load.weights"):
        if where == WAIT_AT:
            print("loading", flush=True)
            threading.Event().wait()


load("import")


async def app(scope: Any, receive: Any, send: Any) -> None:
    """Load once more at startup; answer any request."""
    if scope["type"] == "lifespan":
        await receive()
        load("startup")
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    with stage("inference"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def serve() -> None:
    """Serve on a port of the system's choice, and tell it."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    print(listener.getsockname()[1], flush=True)
    wrapped = StageMiddleware(app, spool=Path(SPOOL), installer=FrameworkHooks())
    config = uvicorn.Config(wrapped, log_level="warning")
    uvicorn.Server(config).run(sockets=[listener])


serve()
