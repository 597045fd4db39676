"""Work that threads, tasks and processes of the app's own do for requests that wait for it."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import multiprocessing
import queue
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stagescope.agent.store.runs import RunStore
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.batch import batch
from stagescope.middleware.hooks.hook import install
from stagescope.middleware.runtime import shared_rounds, workers
from stagescope.middleware.stage import stage
from stagescope.recorder.spool import RUNS_FOLDER
from stagescope.records import BatchRecord, RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
MS = 1_000_000
PLAIN_WAIT = threading.Condition.wait
NOISE_MS = 80
"""By so much a machine that does much else may be late; what is planted takes 200 ms."""
App = Callable[[int], Awaitable[None]]


def served(
    tmp_path: Path, loop: Callable[[], Any], app: App, requests: int, *, run: bytes = b"run-1"
) -> list[dict[str, float]]:
    """Serve *requests* at the same time, and return the ms in each stage, for each of them."""
    return [by_stage(record) for record in recorded(tmp_path, loop, app, requests, run=run)[0]]


def recorded(
    tmp_path: Path, loop: Callable[[], Any], app: App, requests: int, *, run: bytes = b"run-1"
) -> tuple[list[RequestRecord], list[BatchRecord]]:
    """Serve *requests* at the same time, and return their records, and those of batches."""
    recording = Recording(tmp_path)
    RunStore(tmp_path / RUNS_FOLDER).open("run-1")

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        return None

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await app(int(scope["path"][1:]))
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    around: Any = StageMiddleware.around(serve, recording.recorder)

    def request(number: int) -> Any:
        headers = [(b"baggage", b"stagescope.run=" + run)] if run else []
        scope = {"type": "http", "method": "GET", "path": f"/{number}", "headers": headers}
        return around(scope, receive, send)

    async def main() -> None:
        await asyncio.gather(*(request(number) for number in range(requests)))

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
    shared_rounds.write_all()  # As a moment later, on a loop that goes on.
    records, batches = sorted(recording.requests, key=lambda record: record.path), recording.batches
    recording.close()
    return records, batches


def by_stage(record: RequestRecord | BatchRecord) -> dict[str, float]:
    """Return ms by stage."""
    sums: dict[str, float] = {"total": record.duration_ns / MS}
    for span in record.stages:
        sums[span.stage] = sums.get(span.stage, 0) + span.self_ns / MS
    return sums


@contextmanager
def thread(target: Callable[[], None]) -> Iterator[None]:
    """Let *target* run beside, in a thread that knows no request."""
    worker = threading.Thread(target=target)
    worker.start()
    try:
        yield
    finally:
        worker.join(20)


def model(seconds: float = 0.2) -> float:
    """Be a model that a worker runs; return the ms that it took."""
    begun = time.monotonic()
    with stage("inference"):
        time.sleep(seconds)
    return (time.monotonic() - begun) * 1e3


@contextmanager
def model_thread(
    answer: Callable[[Any], object],
) -> Iterator[tuple[queue.Queue[Any], list[float]]]:
    """Let a thread run the model for each future in a queue, and *answer* it then.

    Yields the queue, and the ms that each call of the model took.
    """
    jobs: queue.Queue[Any] = queue.Queue()
    took: list[float] = []

    def work() -> None:
        while (future := jobs.get(timeout=20)) is not None:
            took.append(model())
            answer(future)

    with thread(work):
        yield jobs, took
        jobs.put(None)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_model_thread_that_answers_through_the_loop(
    tmp_path: Path, loop: Callable[[], Any]
) -> None:
    """Each request has its own model call, and waited for those of the requests before it."""

    def through_the_loop(future: Any) -> None:
        future.get_loop().call_soon_threadsafe(future.set_result, None)

    async def app(number: int) -> None:
        future = asyncio.get_running_loop().create_future()
        jobs.put(future)
        await future

    with model_thread(through_the_loop) as (jobs, took):
        found = served(tmp_path, loop, app, 3)

    for number, stages in enumerate(found):
        assert stages["inference"] == pytest.approx(took[number], abs=NOISE_MS)
        assert stages.get("queue.worker", 0) == pytest.approx(sum(took[:number]), abs=NOISE_MS)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_batcher_of_a_queue_and_an_executor(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """All members of a batch have its model call; a member of the next one waited for it."""
    took: list[float] = []

    async def batcher(jobs: asyncio.Queue[Any], pool: ThreadPoolExecutor) -> None:
        while True:
            batch = [await jobs.get()]
            deadline = asyncio.get_running_loop().time() + 0.2
            while len(batch) < 2 and (left := deadline - asyncio.get_running_loop().time()) > 0:
                try:
                    batch.append(await asyncio.wait_for(jobs.get(), left))
                except TimeoutError:
                    break
            took.append(await asyncio.get_running_loop().run_in_executor(pool, model))
            for future in batch:
                future.set_result(None)

    made: list[Any] = []

    async def app(number: int) -> None:
        if number == 0:
            # As a startup hook does: in a context without any request.
            jobs: asyncio.Queue[Any] = asyncio.Queue()
            running = asyncio.get_running_loop()
            running.call_soon(
                lambda: made.append(running.create_task(batcher(jobs, pool))), context=empty
            )
            made.append(jobs)
        future = asyncio.get_running_loop().create_future()
        await made[0].put(future)
        await future
        if number == 2:
            made[1].cancel()

    empty = contextvars.Context()
    with ThreadPoolExecutor(1) as pool:
        records, batches = recorded(tmp_path, loop, app, 3)

    found = [by_stage(record) for record in records]
    # The two that shared a call of the model are a batch; the third was alone.
    (shared,) = batches
    assert [record.batch_ids for record in records] == [(shared.batch_id,), (shared.batch_id,), ()]
    assert {member.span_id for member in shared.members} == {one.span_id for one in records[:2]}
    assert (shared.size, shared.run_id) == (2, "run-1")
    assert by_stage(shared)["inference"] == pytest.approx(took[0], abs=NOISE_MS)
    assert [round(s["inference"]) for s in found] == pytest.approx(
        [took[0], took[0], took[1]], abs=NOISE_MS
    )
    assert found[2]["queue.worker"] == pytest.approx(took[0], abs=NOISE_MS)
    assert found[2]["batch.wait"] == pytest.approx(200, abs=NOISE_MS)
    assert all(s["total"] - sum(v for k, v in s.items() if k != "total") < NOISE_MS for s in found)


def in_process(seconds: float) -> float:
    """Run a model in another process."""
    return model(seconds)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_process_pool(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """What a pool's process did is the request's, whose call it was; the second one waited."""
    install("concurrent.futures.process")
    took: dict[int, float] = {}

    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(in_process, 0.001).result(60) > 0

        async def app(number: int) -> None:
            running = asyncio.get_running_loop()
            took[number] = await running.run_in_executor(pool, in_process, 0.2)

        first, second = served(tmp_path, loop, app, 2)

    assert first["inference"] == pytest.approx(took[0], abs=NOISE_MS)
    assert second["inference"] == pytest.approx(took[1], abs=NOISE_MS)
    assert second["queue.worker"] == pytest.approx(took[0], abs=NOISE_MS)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stream_of_tokens_out_of_one_call(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """Waiting for each token of a long call is inference, also after the sixteenth."""
    took: list[float] = []

    def generate(running: Any, tokens: asyncio.Queue[Any]) -> None:
        begun = time.monotonic()
        with stage("inference"):
            for _ in range(30):
                time.sleep(0.008)
                running.call_soon_threadsafe(tokens.put_nowait, "token")
            took.append((time.monotonic() - begun) * 1e3)
        running.call_soon_threadsafe(tokens.put_nowait, None)

    async def stream(tokens: asyncio.Queue[Any]) -> AsyncIterator[str]:
        while (token := await tokens.get()) is not None:
            yield token

    async def app(number: int) -> None:
        tokens: asyncio.Queue[Any] = asyncio.Queue()
        running = asyncio.get_running_loop()
        worker = threading.Thread(target=generate, args=(running, tokens))
        worker.start()
        async for _ in stream(tokens):
            pass
        worker.join(20)

    (found,) = served(tmp_path, loop, app, 1)

    assert found["inference"] == pytest.approx(took[0], rel=0.15)


@pytest.mark.parametrize("loop", LOOPS)
def test_a_stream_goes_on_while_the_loop_is_held(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """While the model makes the next token, it is no wait for the loop that one comes late."""
    begun, done = threading.Event(), threading.Event()

    def generate(running: Any, tokens: asyncio.Queue[Any]) -> None:
        with stage("inference"):
            running.call_soon_threadsafe(tokens.put_nowait, "token")
            begun.set()
            done.wait(20)
            running.call_soon_threadsafe(tokens.put_nowait, "token")
            time.sleep(0.2)
            running.call_soon_threadsafe(tokens.put_nowait, "token")
        running.call_soon_threadsafe(tokens.put_nowait, None)

    async def app(number: int) -> None:
        if number == 1:
            begun.wait(20)
            time.sleep(0.3)  # noqa: ASYNC251 - what is planted here
            done.set()
            return
        tokens: asyncio.Queue[Any] = asyncio.Queue()
        worker = threading.Thread(target=generate, args=(asyncio.get_running_loop(), tokens))
        worker.start()
        while await tokens.get() is not None:
            await asyncio.sleep(0)
        worker.join(20)

    streaming, _ = served(tmp_path, loop, app, 2)

    assert streaming["inference"] == pytest.approx(500, abs=2 * NOISE_MS)


@pytest.mark.parametrize("loop", LOOPS)
def test_an_endpoint_in_a_thread_that_waits_for_another_thread(
    tmp_path: Path, loop: Callable[[], Any]
) -> None:
    """A `def` endpoint blocks on a future that the model's thread sets."""

    def endpoint() -> None:
        future: Future[None] = Future()
        jobs.put(future)
        future.result(20)

    with model_thread(lambda future: future.set_result(None)) as (jobs, took):
        found = served(tmp_path, loop, lambda number: asyncio.to_thread(endpoint), 2)

    waits = sorted(stages.get("queue.worker", 0) for stages in found)
    assert [stages["inference"] for stages in found] == pytest.approx(took, abs=NOISE_MS)
    assert waits == pytest.approx([0, took[0]], abs=NOISE_MS)


@pytest.mark.parametrize("loop", LOOPS)
def test_waiting_for_a_lock_is_not_the_others_work(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """Who waits until another request has used the model gets none of its time as inference."""
    made: list[asyncio.Lock] = []
    took: dict[int, float] = {}

    async def app(number: int) -> None:
        if not made:
            made.append(asyncio.Lock())
        async with made[0]:
            took[number] = await asyncio.to_thread(model)

    for number, stages in enumerate(served(tmp_path, loop, app, 3)):
        assert stages["inference"] == pytest.approx(took[number], abs=NOISE_MS)
        assert "queue.worker" not in stages


@pytest.mark.parametrize("loop", LOOPS)
def test_a_mark_around_the_waiting_wins(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """Where the app says itself what the waiting is, that is what it is."""

    def work(future: Any) -> None:
        model()
        future.get_loop().call_soon_threadsafe(future.set_result, None)

    async def app(number: int) -> None:
        future = asyncio.get_running_loop().create_future()
        with thread(lambda: work(future)), stage("rerank"):
            await future

    (found,) = served(tmp_path, loop, app, 1)

    assert found["rerank"] == pytest.approx(200, abs=NOISE_MS)
    assert "inference" not in found


def thread_facts(record: RequestRecord) -> list[tuple[int, int, float]]:
    """Return when a thread was at work for it, absolute, and for how many ms it was off its core."""
    off = {f.start_ns: (f.end_ns - f.start_ns) / MS for f in record.wait_facts if f.kind == "off"}
    return [
        (record.start_ns + f.start_ns, record.start_ns + f.end_ns, off.get(f.start_ns, 0.0))
        for f in record.wait_facts
        if f.kind == "thread"
    ]


def test_what_a_models_thread_waited_for_itself_is_known(tmp_path: Path) -> None:
    """The thread that ran the model slept in it: its clock was read for the request it served."""

    def through_the_loop(future: Any) -> None:
        future.get_loop().call_soon_threadsafe(future.set_result, None)

    async def app(number: int) -> None:
        future = asyncio.get_running_loop().create_future()
        jobs.put(future)
        await future

    with model_thread(through_the_loop) as (jobs, took):
        records, _ = recorded(tmp_path, asyncio.new_event_loop, app, 2)

    for record, model_ms in zip(records, took, strict=True):
        ((start, end, off_ms),) = thread_facts(record)
        (inference,) = [span for span in record.stages if span.stage == "inference"]
        assert (start, end) == (
            record.start_ns + inference.start_ns,
            record.start_ns + inference.end_ns,
        )
        assert off_ms == pytest.approx(model_ms, abs=NOISE_MS)


def test_a_batchers_thread_is_read_for_each_member(tmp_path: Path) -> None:
    """The members of a batch share the stretch in which its thread was at work, and the waits in it."""
    tickets: queue.Queue[Any] = queue.Queue()

    async def app(number: int) -> None:
        future = asyncio.get_running_loop().create_future()
        tickets.put((batch.enqueue(), future))
        await future

    def work() -> None:
        members = [tickets.get(timeout=20) for _ in range(2)]
        with batch() as formed:
            formed.add(*(ticket for ticket, _ in members))
            with formed.inference():
                time.sleep(0.2)
        for _, future in members:
            future.get_loop().call_soon_threadsafe(future.set_result, None)

    with thread(work):
        records, _ = recorded(tmp_path, asyncio.new_event_loop, app, 2)

    ((first,), (second,)) = map(thread_facts, records)
    assert first == second
    start, end, off_ms = first
    assert (end - start) / MS >= 200
    assert off_ms >= 150


def test_outside_a_load_run_nothing_is_watched(tmp_path: Path) -> None:
    """A request without a run's baggage switches nothing on."""
    plain = threading.Condition.wait

    async def app(number: int) -> None:
        assert not workers.on
        assert threading.Condition.wait is plain

    served(tmp_path, asyncio.new_event_loop, app, 1, run=b"")


@pytest.fixture(autouse=True)
def off() -> Iterator[None]:
    """Nothing is watched any more once the event loops are gone."""
    yield
    wait_until(lambda: gc.collect() >= 0 and not workers.on)
    assert threading.Condition.wait is PLAIN_WAIT
