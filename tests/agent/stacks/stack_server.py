"""A real server with a hot function, a sleep and C code on its event loop; prints its port."""

import re
import socket
import time

import uvicorn
from fastapi import FastAPI

from stagescope import StageMiddleware, stage

app = FastAPI()


def planted(seconds: float) -> None:
    """Be hot."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        re.escape("a" * 100)


def model(seconds: float) -> None:
    """Be less so, in another stage."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        "b".join(["b"] * 100)


@stage("preprocess")
def prepare() -> None:
    """Be a stage by decorator."""
    planted(0.008)


@app.get("/decorated")
async def decorated() -> None:
    prepare()
    with stage("inference"):
        model(0.004)


@app.get("/block")
async def block() -> None:
    with stage("preprocess"):
        planted(0.008)
    with stage("inference"):
        model(0.004)


@app.get("/sleeps")
async def sleeps() -> None:
    time.sleep(0.7)  # noqa: ASYNC251 - what is planted


@app.get("/in-c")
async def in_c() -> None:
    sum(range(40_000_000))


if __name__ == "__main__":
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    served = StageMiddleware(app, service="hot")
    uvicorn.Server(uvicorn.Config(served, log_level="error")).run([listener])
