"""A served app whose clients take the first bytes of each response, and no more."""

import asyncio
import sys

import uvicorn

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.stage import stage
from stagescope.middleware.types import Message, Receive, Scope, Send


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    """Infer, and respond in two chunks."""
    await receive()
    with stage("inference"):
        await asyncio.sleep(0)
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"first ", "more_body": True})
    await send({"type": "http.response.body", "body": b"last"})


async def stuck(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand where the server is: its `send` takes the last chunk, and never returns."""

    async def taken(message: Message) -> None:
        if message.get("body") == b"last":
            await asyncio.sleep(3600)
        await send(message)

    await timed(scope, receive, taken)


timed = StageMiddleware(app, "streams", sys.argv[1])

if __name__ == "__main__":
    uvicorn.run(
        stuck, port=int(sys.argv[2]), lifespan="off", log_level="warning",
    )  # fmt: skip
