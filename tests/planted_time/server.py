"""A real server whose stages take times that are known: each path is one way in which servers work.

What each stage took by itself is measured here, around the planted piece alone: CPU time of the
thread where it computes, monotonic time less the thread's time in a run queue where it sleeps.
`/truth` answers with these times, ms, a list a path and stage, and forgets them.
"""

from __future__ import annotations

import asyncio
import gc
import itertools
import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from statistics import median
from typing import Any

import anyio
import anyio.to_thread

from stagescope import StageMiddleware, batch, stage

Step = Callable[[], Awaitable[None]]
Send = Callable[[dict[str, Any]], Awaitable[None]]

_pool = ThreadPoolExecutor(64)
_cycle: list[Any] = []
_truth: dict[tuple[str, str], list[float]] = defaultdict(list)
_late_ms: dict[float, float] = {}
"""By how much a timer of so many seconds comes late on this loop when nothing else runs."""
_nap_ms: dict[float, float] = {}
"""What a nap of so many ms takes when nothing else runs."""
_wire_ms = 0.0
"""What an exchange with the outside takes on the free loop beyond what the outside says."""
_model_lock = threading.Lock()
_model_free_s = 0.0
"""When a request left the model of `one_model_lock` last."""
_outside_port = 0


def took(path: str, name: str, *milliseconds: float) -> None:
    """Keep what the stage *name* of one request took by itself."""
    _truth[path, name].append(sum(milliseconds))


def burn(milliseconds: float) -> float:
    """Use so much CPU time of this thread; return how much it was."""
    begun = time.thread_time()
    until = begun + milliseconds / 1e3
    while time.thread_time() < until:
        pass
    return (time.thread_time() - begun) * 1e3


def nap(milliseconds: float) -> float:
    """Block this thread for so long; return how long it was, without the wait for a core after."""
    begun, queued = time.monotonic(), _queued_ms()
    time.sleep(milliseconds / 1e3)
    return (time.monotonic() - begun) * 1e3 - (_queued_ms() - queued)


def napped(milliseconds: float) -> float:
    """Nap; return what so long a nap takes when nothing else runs: no wait for a lock after it."""
    nap(milliseconds)
    return _nap_ms[milliseconds]


def _queued_ms() -> float:
    return int(Path("/proc/thread-self/schedstat").read_bytes().split()[1]) / 1e6


def slept(seconds: float) -> float:
    """Return what `asyncio.sleep` of so long takes on this loop by itself, ms."""
    return seconds * 1e3 + _late_ms[seconds]


async def headline() -> None:
    """Preprocess holds the loop, the model is elsewhere."""
    with stage("preprocess"):
        took("headline", "preprocess", burn(18))
    with stage("inference"):
        await asyncio.sleep(0.005)
    took("headline", "inference", slept(0.005))


async def blocking() -> None:
    """Preprocess blocks the loop without using a core."""
    with stage("preprocess"):
        took("blocking", "preprocess", napped(18))
    with stage("inference"):
        await asyncio.sleep(0.005)
    took("blocking", "inference", slept(0.005))


async def _threaded(path: str, in_thread: Callable[..., Awaitable[float]]) -> None:
    with stage("preprocess"):
        took(path, "preprocess", burn(12))
    with stage("inference"):
        took(path, "inference", await in_thread(napped, 12))


async def worker_thread() -> None:
    """The model sleeps in one of anyio's threads, as a `def` endpoint does."""
    await _threaded("worker_thread", anyio.to_thread.run_sync)


async def to_thread() -> None:
    """The model sleeps in a thread of asyncio's."""
    await _threaded("to_thread", lambda work, *args: asyncio.to_thread(work, *args))


async def executor() -> None:
    """The model sleeps in a pool of the app's own."""
    loop = asyncio.get_running_loop()
    await _threaded("executor", lambda work, *args: loop.run_in_executor(_pool, work, *args))


async def few_threads() -> None:
    """Two worker threads serve all: who comes while both work waits for a thread."""
    with stage("inference"):
        took("few_threads", "inference",
             await anyio.to_thread.run_sync(napped, 12, limiter=_limiter()))  # fmt: skip


def _limiter() -> anyio.CapacityLimiter:
    global _two_threads
    if _two_threads is None:
        _two_threads = anyio.CapacityLimiter(2)
    return _two_threads


_two_threads: anyio.CapacityLimiter | None = None


async def one_model_lock() -> None:
    """Threads take turns at one model: waiting for its lock is the stage's own time."""

    def infer() -> float:
        global _model_free_s
        begun = time.monotonic()
        with _model_lock:
            # Until the one before left it: what came then was a wait for the interpreter's lock.
            waited = max(0.0, _model_free_s - begun) * 1e3
            spent = napped(10)
            _model_free_s = time.monotonic()
            return waited + spent

    with stage("preprocess"):
        took("one_model_lock", "preprocess", burn(4))
    with stage("inference"):
        took("one_model_lock", "inference",
             await asyncio.get_running_loop().run_in_executor(_pool, infer))  # fmt: skip


async def interpreter_lock() -> None:
    """Preprocess is pure Python in a thread of its own: all others wait for the lock meanwhile."""
    with stage("preprocess"):
        took("interpreter_lock", "preprocess", await anyio.to_thread.run_sync(spin, 25))
    with stage("inference"):
        await asyncio.sleep(0.005)
    took("interpreter_lock", "inference", slept(0.005))


def spin(milliseconds: float) -> float:
    """Compute in pure Python, which holds the interpreter's lock, as `burn` with its calls may not."""
    begun = time.thread_time()
    until, total = begun + milliseconds / 1e3, 0
    while time.thread_time() < until:
        for number in range(2_000):
            total += number
    return (time.thread_time() - begun) * 1e3


async def answer_queue() -> None:
    """A thread of the app's own answers by `call_soon_threadsafe(queue.put_nowait, ...)`."""
    with stage("preprocess"):
        took("answer_queue", "preprocess", burn(12))
    with stage("inference"):
        loop = asyncio.get_running_loop()
        answers: asyncio.Queue[float] = asyncio.Queue()

        def work() -> None:
            spent = napped(8)
            loop.call_soon_threadsafe(answers.put_nowait, spent)

        _pool.submit(work)
        took("answer_queue", "inference", await answers.get())


async def child_task() -> None:
    """The model is awaited in a task of its own."""
    with stage("preprocess"):
        took("child_task", "preprocess", burn(12))
    with stage("inference"):
        await asyncio.create_task(asyncio.sleep(0.008))
    took("child_task", "inference", slept(0.008))


async def gathered() -> None:
    """Two models at once; the longer one counts."""
    with stage("preprocess"):
        took("gathered", "preprocess", burn(12))
    with stage("inference"):
        await asyncio.gather(asyncio.sleep(0.004), asyncio.sleep(0.008))
    took("gathered", "inference", slept(0.008))


async def task_group() -> None:
    """All of it in a task of anyio's, as below Starlette's BaseHTTPMiddleware."""

    async def inside() -> None:
        with stage("preprocess"):
            took("task_group", "preprocess", burn(12))
        with stage("inference"):
            await asyncio.sleep(0.008)
        took("task_group", "inference", slept(0.008))

    async with anyio.create_task_group() as group:
        group.start_soon(inside)


async def event() -> None:
    """Another task of the request says when the model is done."""
    done = asyncio.Event()

    async def model() -> None:
        await asyncio.sleep(0.008)
        done.set()

    with stage("preprocess"):
        took("event", "preprocess", burn(12))
    with stage("inference"):
        task = asyncio.create_task(model())
        await done.wait()
        await task
    took("event", "inference", slept(0.008))


async def in_steps() -> None:
    """A model that gives the loop back between its four steps."""
    with stage("preprocess"):
        took("in_steps", "preprocess", burn(8))
    used = []
    with stage("inference"):
        for _ in range(4):
            used.append(burn(2))
            await asyncio.sleep(0)
    took("in_steps", "inference", *used)


async def postprocess_holds() -> None:
    """The last stage holds the loop, in the same step as the answer."""
    with stage("inference"):
        await asyncio.sleep(0.008)
    took("postprocess_holds", "inference", slept(0.008))
    with stage("postprocess"):
        took("postprocess_holds", "postprocess", burn(14))


async def collections() -> None:
    """A good part of what preprocess takes is the garbage collector."""
    with stage("preprocess"):
        used = burn(8)
        gc.collect()
        took("collections", "preprocess", used)
    with stage("inference"):
        await asyncio.sleep(0.008)
    took("collections", "inference", slept(0.008))


_stopping_calls = itertools.count(1)


async def stopping() -> None:
    """While the twentieth request is served the process is stopped, for 1.2 s."""
    with stage("inference"):
        await asyncio.sleep(0.008)
        if next(_stopping_calls) == 20:
            pid = os.getpid()
            command = f"kill -STOP {pid}; sleep 1.2; kill -CONT {pid}"
            await asyncio.create_subprocess_exec("sh", "-c", command)
    took("stopping", "inference", slept(0.008))


async def outside() -> None:
    """The model is another process, asked over a socket."""
    with stage("preprocess"):
        took("outside", "preprocess", burn(10))
    with stage("inference"):
        took("outside", "inference", await _asked(), _wire_ms)


async def _asked() -> float:
    reader, writer = await asyncio.open_connection("127.0.0.1", _outside_port)
    writer.write(b"8\n")
    answer = await reader.readline()
    writer.close()
    return float(answer)


_tickets: SimpleQueue[tuple[Any, Any, asyncio.AbstractEventLoop]] = SimpleQueue()
_BATCH = 4


async def batched() -> None:
    """A batcher's thread serves up to four requests at once."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[float] = loop.create_future()
    _tickets.put((batch.enqueue(), done, loop))
    took("batched", "inference", await done)


def _batcher() -> None:
    while True:
        members = [_tickets.get()]
        until = time.monotonic() + 0.004
        while len(members) < _BATCH:
            try:
                members.append(_tickets.get(timeout=max(0.0, until - time.monotonic())))
            except Empty:
                break
        with batch(model="planted") as formed:
            formed.add(*(ticket for ticket, _, _ in members))
            with formed.inference():
                spent = napped(16)
        for _, done, loop in members:
            loop.call_soon_threadsafe(done.set_result, spent)


PATHS: dict[str, Step] = {
    f"/{step.__name__}": step
    for step in (
        headline, blocking, worker_thread, to_thread, executor, few_threads, one_model_lock,
        interpreter_lock, answer_queue, child_task, gathered, task_group, event, in_steps,
        postprocess_holds, collections, outside, batched, stopping,
    )
}  # fmt: skip


@contextmanager
def _outside_process() -> Iterator[int]:
    """Run the process that `outside` asks, and yield its port."""
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).parent / "outside.py")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


async def _calibrate() -> None:
    global _wire_ms
    for seconds in (0.005, 0.008):
        late = []
        for _ in range(20):
            begun = time.monotonic()
            await asyncio.sleep(seconds)
            late.append((time.monotonic() - begun - seconds) * 1e3)
        _late_ms[seconds] = median(late)
    for milliseconds in (8, 10, 12, 16, 18):
        _nap_ms[milliseconds] = median([nap(milliseconds) for _ in range(10)])
    wire = []
    for _ in range(20):
        begun = time.monotonic()
        said = await _asked()
        wire.append((time.monotonic() - begun) * 1e3 - said)
    _wire_ms = median(wire)


async def _live(receive: Any, send: Send) -> None:
    global _outside_port
    _cycle.extend([] for _ in range(200_000))  # So that a collection takes a while.
    threading.Thread(target=_batcher, daemon=True).start()
    with _outside_process() as _outside_port:
        while (message := await receive())["type"] != "lifespan.shutdown":
            await _calibrate()
            await send({"type": f"{message['type']}.complete"})
    await send({"type": "lifespan.shutdown.complete"})


async def served(scope: Any, receive: Any, send: Send) -> None:
    """Serve one path."""
    if scope["type"] == "lifespan":
        await _live(receive, send)
        return
    await receive()
    body = b"ok"
    if scope["path"] == "/truth":
        told = {f"{path} {name}": times for (path, name), times in _truth.items()}
        body = json.dumps(told | {"pid": [os.getpid()]}).encode()
        _truth.clear()
    else:
        await PATHS[scope["path"]]()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": body})


app = StageMiddleware(served)
