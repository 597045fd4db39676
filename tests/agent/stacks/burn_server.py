"""An app whose stages use known CPU time, on its event loop and in worker threads.

Each burn ends by the thread's own CPU clock, so that a busy host does not change what it used.
"""

import asyncio
import os
import re
import time

from fastapi import FastAPI

from stagescope import StageMiddleware, stage

BURNS_MS = {"preprocess": 30, "inference": 30, "postprocess": 20, "endpoint": 20}
"""By stage, of one request for `/all` and one for `/plain`."""


def burn(milliseconds: float) -> None:
    """Use so much CPU time, in Python code."""
    end = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < end:
        re.escape("a" * 100)


app = FastAPI()


@app.get("/all")
async def everything() -> int:
    """Burn on the loop, by `to_thread`, and in an executor."""
    with stage("preprocess"):
        burn(BURNS_MS["preprocess"])
    with stage("inference"):
        await asyncio.to_thread(burn, BURNS_MS["inference"])
    with stage("postprocess"):
        await asyncio.get_running_loop().run_in_executor(None, burn, BURNS_MS["postprocess"])
    return os.getpid()


@app.get("/plain")
def plain() -> int:
    """Burn in an endpoint without `async`, which opens no stage."""
    burn(BURNS_MS["endpoint"])
    return os.getpid()


served = StageMiddleware(app, service="burns")
