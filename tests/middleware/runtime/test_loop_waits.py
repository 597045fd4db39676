"""Steps of a load run's requests on real event loops, and the loops' own functions after it."""

from __future__ import annotations

import asyncio
import threading
import time
from asyncio import futures
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stagescope.agent.store.runs import RunStore
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.runtime import loop_waits
from stagescope.middleware.stage import in_other_thread
from stagescope.recorder import format as fmt
from stagescope.recorder.spool import RUNS_FOLDER
from stagescope.records import RequestRecord
from stagescope.stages import WaitFact
from stagescope.testing.recording import Recording

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
REPLACED = ("create_future", "call_later", "call_soon_threadsafe", "create_task")
MS = 1_000_000


def facts(
    tmp_path: Path, loop: Callable[[], Any], *apps: Any, **run: bytes
) -> list[list[WaitFact]]:
    """Serve one request by each of *apps*, at the same time, and return the facts of each."""
    return [list(record.wait_facts) for record in served(tmp_path, loop, *apps, **run)]


def served(
    tmp_path: Path,
    loop: Callable[[], Any],
    *apps: Callable[[], Any],
    run: bytes = b"run-1",
    opened: bytes = b"run-1",
) -> list[RequestRecord]:
    """Serve one request by each of *apps*, at the same time, and return their records."""
    recording = Recording(tmp_path)
    RunStore(tmp_path / RUNS_FOLDER).open(opened.decode())

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        return None

    def request(app: Callable[[], Any], number: int) -> Any:
        async def serve(scope: Any, receive: Any, send: Any) -> None:
            await app()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b""})

        scope = {
            "type": "http",
            "method": "GET",
            "path": f"/{number}",
            "headers": [(b"baggage", b"stagescope.run=" + run)] if run else [],
        }
        around: Any = StageMiddleware.around(serve, recording.recorder)
        return around(scope, receive, send)

    async def main() -> None:
        await asyncio.gather(*(request(app, number) for number, app in enumerate(apps)))

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())
    records = sorted(recording.requests, key=lambda record: record.path)
    recording.close()
    return records


def longest(found: list[WaitFact], kind: str) -> int:
    """Return the longest of one kind, ms."""
    return (
        max((fact.end_ns - fact.start_ns for fact in found if fact.kind == kind), default=0) // MS
    )


async def block() -> None:
    """Hold the loop."""
    await asyncio.sleep(0.01)
    time.sleep(0.1)  # noqa: ASYNC251 - what is recorded here


@pytest.mark.parametrize("loop", LOOPS)
def test_a_late_timer_and_who_ran_meanwhile(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """One request sleeps 50 ms while another blocks the loop from 10 to 110 ms."""
    waiting, blocking = facts(tmp_path, loop, lambda: asyncio.sleep(0.05), block)

    assert longest(waiting, "due") >= 40
    assert longest(blocking, "ran") >= 95
    assert longest(blocking, "off") >= 50


@pytest.mark.parametrize("loop", LOOPS)
def test_what_another_thread_answered_is_ready_from_then(
    tmp_path: Path, loop: Callable[[], Any]
) -> None:
    """A future that a thread sets after 50 ms is ready then, not when the loop gets to it."""

    async def answered() -> None:
        running = asyncio.get_running_loop()
        future: asyncio.Future[None] = running.create_future()
        threading.Timer(0.05, running.call_soon_threadsafe, (future.set_result, None)).start()
        await future

    waiting, _ = facts(tmp_path, loop, answered, block)

    assert longest(waiting, "ready") >= 30
    assert not longest(waiting, "awaited")


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("by", ["timer", "thread"])
def test_what_is_ready_before_the_loop_is_given_back(
    tmp_path: Path, loop: Callable[[], Any], by: str
) -> None:
    """The rest of the step is work; from its end on the request waits for the loop alone."""

    async def app() -> None:
        running = asyncio.get_running_loop()
        future: asyncio.Future[None] = running.create_future()
        if by == "timer":
            running.call_later(0.01, futures._set_result_unless_cancelled, future, None)  # type: ignore[attr-defined]
        else:
            running.call_soon_threadsafe(futures._set_result_unless_cancelled, future, None)  # type: ignore[attr-defined]
        time.sleep(0.05)  # noqa: ASYNC251 - it has no core, or computes
        running.call_soon(time.sleep, 0.1)
        await future

    (found,) = facts(tmp_path, loop, app)

    assert longest(found, "ran") >= 45
    assert longest(found, "due" if by == "timer" else "ready") >= 95
    assert not longest(found, "awaited")


@pytest.mark.parametrize("run", [b"", b"named-by-a-stranger"])
def test_outside_an_opened_load_run_there_are_no_facts(tmp_path: Path, run: bytes) -> None:
    """A request that names no run, or one that nobody opened here, is served as it was."""
    assert facts(tmp_path, asyncio.new_event_loop, block, run=run) == [[]]


@pytest.mark.parametrize("loop", LOOPS)
def test_the_loop_gets_its_functions_back(
    loop: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are replaced while requests of a load run come, and not for long after."""
    monkeypatch.setattr(loop_waits, "QUIET_S", 0.01)

    async def main() -> None:
        watch = loop_waits.running_watch()
        assert watch is not None
        assert watch.number < fmt.LOOPS
        watch.keep_on()
        running = vars(asyncio.get_running_loop())
        assert {*REPLACED} <= running.keys()
        deadline = time.monotonic() + 20
        while {*REPLACED} & running.keys():
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())


@pytest.mark.parametrize("loop", LOOPS)
def test_code_of_no_request_keeps_the_loop_busy(tmp_path: Path, loop: Callable[[], Any]) -> None:
    """A callback of the app's own computes for 100 ms while a request sleeps: its next step says so."""

    def compute() -> None:
        until = time.thread_time() + 0.1
        while time.thread_time() < until:
            pass

    async def beside() -> None:
        asyncio.get_running_loop().call_later(0.005, compute)
        await asyncio.sleep(0.05)

    (waiting,) = facts(tmp_path, loop, beside)

    assert longest(waiting, "busy") >= 90


@pytest.mark.parametrize("loop", LOOPS)
def test_waiting_for_a_thread_of_an_executor_is_the_thread_pools(
    tmp_path: Path, loop: Callable[[], Any]
) -> None:
    """One thread for two requests of a load run: the second waits in `queue.threadpool`."""
    with ThreadPoolExecutor(1) as pool:

        async def model() -> None:
            work = in_other_thread(time.sleep, time.monotonic_ns())  # As the hook hands it over.
            await asyncio.get_running_loop().run_in_executor(pool, work, 0.05)

        records = served(tmp_path, loop, model, model)

    waits = [record.self_ns().get("queue.threadpool", 0) // MS for record in records]
    assert max(waits) >= 45
