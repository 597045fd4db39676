"""A real server whose stages take times that are known: each path is one way in which servers work.

Burns are of CPU time of the thread, so what a noisy machine takes away is no part of them.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import anyio.to_thread

from stagescope import StageMiddleware, stage

Step = Callable[[], Awaitable[None]]

_pool = ThreadPoolExecutor(2)
_cycle: list[Any] = []


def burn(milliseconds: float) -> None:
    """Use so much CPU time of this thread."""
    until = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < until:
        pass


async def headline() -> None:
    """Preprocess holds the loop, the model is elsewhere."""
    with stage("preprocess"):
        burn(18)
    with stage("inference"):
        await asyncio.sleep(0.005)


async def blocking() -> None:
    """Preprocess blocks the loop without using a core."""
    with stage("preprocess"):
        time.sleep(0.018)  # noqa: ASYNC251 - what is planted here
    with stage("inference"):
        await asyncio.sleep(0.005)


async def worker_thread() -> None:
    """The model sleeps in one of anyio's threads, as a `def` endpoint does."""
    with stage("preprocess"):
        burn(12)
    with stage("inference"):
        await anyio.to_thread.run_sync(time.sleep, 0.012)


async def to_thread() -> None:
    """The model sleeps in a thread of asyncio's."""
    with stage("preprocess"):
        burn(12)
    with stage("inference"):
        await asyncio.to_thread(time.sleep, 0.012)


async def executor() -> None:
    """The model sleeps in a pool of the app's own."""
    with stage("preprocess"):
        burn(12)
    with stage("inference"):
        await asyncio.get_running_loop().run_in_executor(_pool, time.sleep, 0.012)


async def answer_queue() -> None:
    """A thread of the app's own answers by `call_soon_threadsafe(queue.put_nowait, ...)`."""
    with stage("preprocess"):
        burn(12)
    with stage("inference"):
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[None] = asyncio.Queue()

        def work() -> None:
            time.sleep(0.008)
            loop.call_soon_threadsafe(answers.put_nowait, None)

        _pool.submit(work)
        await answers.get()


async def child_task() -> None:
    """The model is awaited in a task of its own."""
    with stage("preprocess"):
        burn(12)
    with stage("inference"):
        await asyncio.create_task(asyncio.sleep(0.008))


async def gathered() -> None:
    """Two models at once; the longer one counts."""
    with stage("preprocess"):
        burn(12)
    with stage("inference"):
        await asyncio.gather(asyncio.sleep(0.004), asyncio.sleep(0.008))


async def task_group() -> None:
    """All of it in a task of anyio's, as below Starlette's BaseHTTPMiddleware."""
    async with anyio.create_task_group() as group:
        group.start_soon(headline)


async def event() -> None:
    """Another task of the request says when the model is done."""
    done = asyncio.Event()

    async def model() -> None:
        await asyncio.sleep(0.008)
        done.set()

    with stage("preprocess"):
        burn(12)
    with stage("inference"):
        task = asyncio.create_task(model())
        await done.wait()
        await task


async def in_steps() -> None:
    """A model that gives the loop back between its four steps."""
    with stage("preprocess"):
        burn(8)
    with stage("inference"):
        for _ in range(4):
            burn(2)
            await asyncio.sleep(0)


async def postprocess_holds() -> None:
    """The last stage holds the loop, in the same step as the answer."""
    with stage("inference"):
        await asyncio.sleep(0.008)
    with stage("postprocess"):
        burn(14)


async def collections() -> None:
    """Half of what preprocess takes is the garbage collector."""
    with stage("preprocess"):
        burn(8)
        gc.collect()
    with stage("inference"):
        await asyncio.sleep(0.008)


PATHS: dict[str, Step] = {
    f"/{step.__name__}": step
    for step in (
        headline, blocking, worker_thread, to_thread, executor, answer_queue,
        child_task, gathered, task_group, event, in_steps, postprocess_holds, collections,
    )
}  # fmt: skip


async def served(scope: Any, receive: Any, send: Any) -> None:
    """Serve one path."""
    if scope["type"] != "http":
        _cycle.extend([] for _ in range(200_000))  # So that a collection takes a while.
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await receive()
    await PATHS[scope["path"]]()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


app = StageMiddleware(served)
