"""Two servers whose stages take times that are set from outside, for benchmarks/whatif.py.

`/loop`: preprocess computes on the event loop, inference is awaited. `/threads`: inference sleeps
in one of a few worker threads. Times are milliseconds: WHATIF_PREPROCESS, WHATIF_INFERENCE;
WHATIF_THREADS is how many threads.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import anyio
import anyio.to_thread

from stagescope import StageMiddleware, stage

PREPROCESS_S = float(os.environ.get("WHATIF_PREPROCESS", "8")) / 1e3
INFERENCE_S = float(os.environ.get("WHATIF_INFERENCE", "20")) / 1e3
THREADS = int(os.environ.get("WHATIF_THREADS", "2"))
_limiters: list[anyio.CapacityLimiter] = []


def burn(seconds: float) -> None:
    """Use so much CPU time of this thread."""
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


async def on_loop() -> None:
    """Hold the loop, then wait for a model elsewhere."""
    with stage("preprocess"):
        burn(PREPROCESS_S)
    with stage("inference"):
        await asyncio.sleep(INFERENCE_S)


async def in_threads() -> None:
    """Wait for a thread in which the model is awaited."""
    if not _limiters:
        _limiters.append(anyio.CapacityLimiter(THREADS))
    with stage("inference"):
        await anyio.to_thread.run_sync(time.sleep, INFERENCE_S, limiter=_limiters[0])


async def served(scope: Any, receive: Any, send: Any) -> None:
    """Serve one path."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await receive()
    if scope["path"] != "/healthz":
        await (on_loop if scope["path"] == "/loop" else in_threads)()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


app = StageMiddleware(served)
