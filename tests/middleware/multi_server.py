"""An app for the servers of test_processes: it tells which process answered."""

import os
from typing import Any

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.stage import stage


async def bare(scope: Any, receive: Any, send: Any) -> None:
    """Answer with the pid, or start and stop."""
    if scope["type"] == "lifespan":
        await receive()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})
        return
    with stage("inference"):
        body = f"{os.getpid()}\n".encode()
    headers = [(b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


app = StageMiddleware(bare, "multi")
