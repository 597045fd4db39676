"""Streams whose prefill burns CPU time, as a small language model's does; run with a port."""

import re
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from stagescope import StageMiddleware, stage

PREFILL_S = 0.02
TOKENS = 5


def burn_prefill(seconds: float) -> None:
    """Use so much CPU time, in Python code."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        re.escape("a" * 100)


app = FastAPI()


@app.middleware("http")
async def hands_on(
    request: Request, call_next: Callable[[Request], Awaitable[Response]]
) -> Response:
    """Do nothing, as many an app's middleware does for most requests."""
    return await call_next(request)


@app.get("/marked")
async def marked() -> StreamingResponse:
    """Stream with the model's work marked."""

    async def tokens() -> AsyncIterator[str]:
        with stage("inference.prefill"):
            burn_prefill(PREFILL_S)
        for _ in range(TOKENS):
            yield "token"

    return StreamingResponse(tokens())


@app.get("/unmarked")
async def unmarked() -> StreamingResponse:
    """Stream with no mark."""

    async def tokens() -> AsyncIterator[str]:
        burn_prefill(PREFILL_S)
        for _ in range(TOKENS):
            yield "token"

    return StreamingResponse(tokens())


app.add_middleware(StageMiddleware, service="streams")

if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
