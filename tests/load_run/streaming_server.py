"""A served app that sends the first bytes of each response, and never the last."""

import asyncio
import sys

import uvicorn

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.stage import stage
from stagescope.middleware.types import Receive, Scope, Send


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Infer, begin to respond, and go on responding."""
    await receive()
    with stage("inference"):
        await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first ", "more_body": True})
    await asyncio.sleep(3600)


if __name__ == "__main__":
    uvicorn.run(
        StageMiddleware(app, "streams", sys.argv[1]), port=int(sys.argv[2]),
        lifespan="off", log_level="warning",
    )  # fmt: skip
