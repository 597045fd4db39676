"""Servers with one planted bottleneck each: `/NAME?x=STRENGTH`, one process a shape.

What is planted is in SHAPES of shapes.py; here is how.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import os
import random
import threading
import time
import zlib
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue
from typing import Any
from urllib.parse import parse_qs

import anyio
import anyio.to_thread

from stagescope import StageMiddleware, batch, stage

Answer = tuple[int, bytes]
Shape = Callable[[float], Awaitable[Answer | None]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_pool = ThreadPoolExecutor(64)
_chance = random.Random(1)
_numbers = itertools.count()
_outside_port = int(os.environ.get("PLANTED_OUTSIDE", "0"))
_NOISE = os.urandom(400_000)


def burn(milliseconds: float) -> None:
    """Compute in Python for so much CPU time."""
    until = time.thread_time() + milliseconds / 1e3
    while time.thread_time() < until:
        pass


def nap(milliseconds: float) -> None:
    """Block this thread."""
    time.sleep(milliseconds / 1e3)


def native(milliseconds: float) -> None:
    """Compute outside the interpreter's lock."""
    hashlib.pbkdf2_hmac("sha256", b"planted", b"salt", int(milliseconds * _ROUNDS_PER_MS))


def _rounds_per_ms() -> float:
    begun = time.thread_time()
    hashlib.pbkdf2_hmac("sha256", b"planted", b"salt", 20_000)
    return 20_000 / ((time.thread_time() - begun) * 1e3)


_ROUNDS_PER_MS = _rounds_per_ms()


async def _in_pool(work: Callable[..., Any], *args: Any) -> Any:
    return await asyncio.get_running_loop().run_in_executor(_pool, work, *args)


async def _model() -> None:
    """A model that is no bottleneck."""
    with stage("inference"):
        await _in_pool(nap, 4)


async def loop_burn(x: float) -> None:
    """Preprocess computes on the loop."""
    with stage("preprocess"):
        burn(8)
    await _model()


async def loop_block(x: float) -> None:
    """Preprocess blocks the loop without computing."""
    with stage("preprocess"):
        nap(9)
    await _model()


async def loop_post(x: float) -> None:
    """Postprocess computes on the loop."""
    await _model()
    with stage("postprocess"):
        burn(9)


async def loop_model(x: float) -> None:
    """The model itself runs on the loop."""
    with stage("preprocess"):
        burn(0.3)
    with stage("inference"):
        native(9)


_two = anyio.CapacityLimiter(2)
_eight = anyio.CapacityLimiter(8)


async def threads_two(x: float) -> None:
    """Two threads serve the model."""
    with stage("inference"):
        await anyio.to_thread.run_sync(nap, 15, limiter=_two)


async def threads_eight(x: float) -> None:
    """Eight threads fetch what preprocess needs."""
    with stage("preprocess"):
        await anyio.to_thread.run_sync(nap, 60, limiter=_eight)
    with stage("inference"):
        burn(0.5)


async def gil_model(x: float) -> None:
    """The model is Python in threads."""
    with stage("inference"):
        await _in_pool(burn, 8)


async def gil_preprocess(x: float) -> None:
    """Preprocess is Python in threads."""
    with stage("preprocess"):
        await asyncio.to_thread(burn, 9)
    await _model()


async def cpu_model(x: float) -> None:
    """The model uses up the cores."""
    with stage("inference"):
        await _in_pool(native, 14)


async def cpu_preprocess(x: float) -> None:
    """Preprocess compresses in threads."""
    with stage("preprocess"):
        await _in_pool(zlib.compress, _NOISE)
    with stage("inference"):
        burn(0.3)


async def _outside(milliseconds: float) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", _outside_port)
    writer.write(f"{milliseconds}\n".encode())
    await reader.readline()
    writer.close()


async def dep_store(x: float) -> None:
    """Preprocess asks a feature store."""
    with stage("preprocess"):
        await _outside(x)
    await _model()


async def dep_thread(x: float) -> None:
    """Postprocess writes to a slow disk, in a thread."""
    await _model()
    with stage("postprocess"):
        await _in_pool(nap, x)


async def dep_tail(x: float) -> None:
    """One request in thirty waits long for a lookup."""
    with stage("preprocess"):
        await _outside(x if next(_numbers) % 30 == 7 else 1.0)
    await _model()


async def dep_remote(x: float) -> None:
    """The model is another server."""
    with stage("preprocess"):
        burn(0.5)
    with stage("inference"):
        await _outside(x)


_tickets: SimpleQueue[Any] = SimpleQueue()


def _batcher(delay_s: float, most: int, infer_ms: float) -> None:
    while True:
        members = [_tickets.get()]
        until = time.monotonic() + delay_s
        while len(members) < most:
            try:
                members.append(_tickets.get(timeout=max(0.0, until - time.monotonic())))
            except Empty:
                break
        with batch(model="planted") as formed:
            formed.add(*(ticket for ticket, _, _ in members))
            with formed.inference():
                nap(infer_ms)
        for _, done, loop in members:
            loop.call_soon_threadsafe(done.set_result, None)


def _batched(delay_ms: float, most: int, infer_ms: float) -> Shape:
    started: list[threading.Thread] = []

    async def serve(x: float) -> None:
        if not started:
            args = ((delay_ms or x) / 1e3, most, infer_ms)
            started.append(threading.Thread(target=_batcher, args=args, daemon=True))
            started[0].start()
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()
        _tickets.put((batch.enqueue(), done, loop))
        await done

    return serve


class _AsyncBatcher:
    """A batcher on the loop, with `batch` as a task's."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[Any] = asyncio.Queue()
        self.task: asyncio.Task[None] | None = None

    async def run(self, delay_s: float) -> None:
        while True:
            with batch(model="planted") as formed:
                members = [await self.queue.get()]
                formed.add(members[0][0])
                until = time.monotonic() + delay_s
                while len(members) < 32 and (left := until - time.monotonic()) > 0:
                    try:
                        members.append(await asyncio.wait_for(self.queue.get(), left))
                    except TimeoutError:
                        break
                    formed.add(members[-1][0])
                with formed.inference():
                    await _in_pool(nap, 5)
            for _, done in members:
                done.set_result(None)


_async_batcher = _AsyncBatcher()


async def batching_async(x: float) -> None:
    """A batcher on the loop waits long for companions."""
    if _async_batcher.task is None:
        _async_batcher.task = asyncio.create_task(_async_batcher.run(x / 1e3))
    done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    _async_batcher.queue.put_nowait((batch.enqueue(), done))
    await done


_model_lock = asyncio.Lock()
_two_models = asyncio.Semaphore(2)
_thread_lock = threading.Lock()
_jobs: SimpleQueue[Any] = SimpleQueue()
_worker: list[threading.Thread] = []


def _work() -> None:
    while True:
        done, loop = _jobs.get()
        with stage("inference"):
            nap(9)
        loop.call_soon_threadsafe(done.set_result, None)


async def model_queue(x: float) -> None:
    """One model thread serves all."""
    if not _worker:
        _worker.append(threading.Thread(target=_work, daemon=True))
        _worker[0].start()
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()
    with stage("preprocess"):
        burn(0.5)
    _jobs.put((done, loop))
    await done


async def model_lock(x: float) -> None:
    """Requests take turns at one model behind an asyncio lock."""
    with stage("inference"):
        async with _model_lock:
            await _in_pool(nap, 9)


async def model_semaphore(x: float) -> None:
    """Two replicas behind a semaphore."""
    with stage("preprocess"):
        burn(0.5)
    with stage("inference"):
        async with _two_models:
            await _in_pool(nap, 18)


def _locked() -> None:
    with _thread_lock:
        nap(9)


async def model_thread_lock(x: float) -> None:
    """Threads take turns at one model."""
    with stage("inference"):
        await _in_pool(_locked)


async def big_answer(x: float) -> Answer:
    """A large response: what reads it slowly stands before the driver."""
    await _model()
    return 200, bytes(3_000_000)


_cycles: list[Any] = []


async def gc_each(x: float) -> None:
    """Each request collects garbage."""
    if not _cycles:
        _cycles.extend([] for _ in range(int(x * 1000)))
    with stage("preprocess"):
        burn(0.5)
        gc.collect()
    await _model()


async def gc_third(x: float) -> None:
    """Each third request collects garbage, after the model."""
    if not _cycles:
        _cycles.extend([] for _ in range(int(x * 1000)))
    await _model()
    with stage("postprocess"):
        burn(0.3)
        if next(_numbers) % 3 == 0:
            gc.collect()


async def errors_status(x: float) -> Answer:
    """Some are answered with 500."""
    await _model()
    return (500 if _chance.random() * 100 < x else 200), b"ok"


async def errors_raised(x: float) -> None:
    """Some raise."""
    with stage("preprocess"):
        burn(0.5)
        if _chance.random() * 100 < x:
            raise RuntimeError("planted")
    await _model()


_loaded: list[float] = []


async def cold_lazy(x: float) -> None:
    """The first request loads the model, on the loop."""
    with stage("inference"):
        if not _loaded:
            _loaded.append(x)
            nap(x)
        await _in_pool(nap, 4)


async def cold_warmup(x: float) -> None:
    """The first forty calls of the model are slow."""
    slow = next(_numbers) < 40
    with stage("inference"):
        await _in_pool(nap, x if slow else 4)


async def workload_size(x: float) -> Answer:
    """The model's time goes with the answer's size."""
    size = _chance.choice((1, 2, 4, 8, 16))
    with stage("inference"):
        await _in_pool(nap, x * size)
    return 200, bytes(200 * size)


async def workload_loop(x: float) -> Answer:
    """What is computed on the loop goes with the answer's size."""
    size = _chance.choice((1, 2, 5, 12))
    with stage("postprocess"):
        burn(x * size)
    return 200, bytes(300 * size)


async def steady(x: float) -> None:
    """A server that does its work."""
    with stage("preprocess"):
        burn(x)
    await _model()


async def h_fast(x: float) -> None:
    """Almost nothing to do."""
    with stage("inference"):
        burn(1)


async def h_native(x: float) -> None:
    """A small model outside the interpreter's lock, in a thread."""
    with stage("preprocess"):
        burn(0.5)
    with stage("inference"):
        await _in_pool(native, 6)


async def h_async(x: float) -> None:
    """A short call elsewhere."""
    with stage("preprocess"):
        burn(0.5)
    with stage("inference"):
        await _outside(6)


async def mix_loop_dep(x: float) -> None:
    """The loop is held, and a store is slow."""
    with stage("preprocess"):
        burn(8)
    with stage("postprocess"):
        await _outside(25)


async def mix_batch_dep(x: float) -> None:
    """A batch delay, and a store is slow."""
    with stage("preprocess"):
        await _outside(30)
    await batching_async(x)


async def mix_lock_loop(x: float) -> None:
    """One model behind a lock, and a loop that is held."""
    with stage("preprocess"):
        burn(6)
    await model_lock(x)


async def mix_errors_loop(x: float) -> Answer:
    """Errors, and a loop that is held."""
    await loop_burn(x)
    return await errors_status(30)


async def mix_gil_threads(x: float) -> None:
    """Python in two threads only."""
    with stage("inference"):
        await anyio.to_thread.run_sync(burn, 9, limiter=_two)


SHAPES: dict[str, Shape] = {
    f"/{name}": shape
    for name, shape in {
        **{
            shape.__name__: shape
            for shape in (
                loop_burn, loop_block, loop_post, loop_model, threads_two, threads_eight,
                gil_model, gil_preprocess, cpu_model, cpu_preprocess, dep_store, dep_thread,
                dep_tail, dep_remote, batching_async, model_queue, model_lock, model_semaphore,
                model_thread_lock, big_answer, gc_each, gc_third, errors_status, errors_raised,
                cold_lazy, cold_warmup, workload_size, workload_loop, steady, h_fast, h_native,
                h_async, mix_loop_dep, mix_batch_dep, mix_lock_loop, mix_errors_loop,
                mix_gil_threads,
            )
        },
        "batching_delay": _batched(0, 64, 5),
        "model_batched": _batched(1, 4, 16),
        "h_batched": _batched(1, 8, 8),
    }.items()
}  # fmt: skip


async def served(scope: Any, receive: Any, send: Send) -> None:
    """Serve one shape."""
    if scope["type"] == "lifespan":
        while (message := await receive())["type"] != "lifespan.shutdown":
            await send({"type": f"{message['type']}.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    await receive()
    status, body = 200, b"ok"
    if scope["path"] != "/healthz":
        x = float(parse_qs(scope["query_string"].decode()).get("x", ["1"])[0])
        status, body = await SHAPES[scope["path"]](x) or (status, body)
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": body})


app = StageMiddleware(served)
