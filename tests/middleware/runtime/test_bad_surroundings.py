"""Loops that end or are many, threads that die, clocks that step, gevent: waits stay right or absent."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import uvloop

from stagescope.agent.store.runs import RunStore
from stagescope.analysis.waits.requests import Served
from stagescope.analysis.waits.split import split
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.runtime import loop_waits, stamped_future, thread_clock, workers
from stagescope.middleware.stage import carry, stage
from stagescope.recorder.spool import RUNS_FOLDER
from stagescope.records import RequestRecord
from stagescope.testing.recording import Recording
from tests.middleware.runtime.test_loop_waits import longest

LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]
MS = 1_000_000
ROOT = Path(__file__).parents[3]
App = Callable[[], Coroutine[Any, Any, None]]


@pytest.fixture
def recording(tmp_path: Path) -> Iterator[Recording]:
    """A recorder with the load run `run-1` open."""
    made = Recording(tmp_path)
    RunStore(tmp_path / RUNS_FOLDER).open("run-1")
    yield made
    made.close()


def request(recording: Recording, app: App, path: str = "/") -> Coroutine[Any, Any, None]:
    """Return a request of the load run, served by *app*."""

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        return None

    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await app()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    scope = {
        "type": "http",
        "method": "GET",
        "path": path,
        "headers": [(b"baggage", b"stagescope.run=run-1")],
    }
    around: Any = StageMiddleware.around(serve, recording.recorder)
    made: Coroutine[Any, Any, None] = around(scope, receive, send)
    return made


def waits(records: list[RequestRecord]) -> dict[str, dict[str, int]]:
    """Return by path ms by cause, and check that no wait is longer than the request."""
    found = split(
        [
            Served(
                record.path, record.process.ring_id, record.start_ns, record.duration_ns,
                record.start_ns, [(s.stage, s.start_ns, s.end_ns) for s in record.stages],
                record.wait_facts,
            )
            for record in records
        ]
    )  # fmt: skip
    sums: dict[str, dict[str, int]] = {}
    for record in records:
        by_cause = sums[record.path] = {}
        for (_, cause), charge in found[record.path].charges.items():
            assert 0 <= charge.low_ns <= charge.ns <= charge.high_ns
            by_cause[cause] = by_cause.get(cause, 0) + charge.ns // MS
        assert sum(by_cause.values()) <= record.duration_ns // MS
    return sums


async def nap() -> None:
    """Be a model that is awaited."""
    with stage("inference"):
        await asyncio.sleep(0.05)


async def hold() -> None:
    """Hold the loop."""
    await asyncio.sleep(0.01)
    time.sleep(0.3)  # noqa: ASYNC251 - what is looked at here


@pytest.mark.parametrize("loop", LOOPS)
def test_a_loop_that_is_closed_under_its_requests_and_replaced(
    recording: Recording, loop: Callable[[], Any]
) -> None:
    """Requests that a closed loop leaves behind harm nobody; on the next loop waits are measured."""
    first = loop()
    left = first.create_task(request(recording, lambda: asyncio.sleep(600), "/left"))
    first.run_until_complete(request(recording, nap, "/before"))
    first.close()
    left.get_coro().close()
    left._log_destroy_pending = False
    del left, first
    gc.collect()

    async def both() -> None:
        await asyncio.gather(request(recording, nap, "/after"), request(recording, hold, "/hold"))

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(both())

    records = {record.path: record for record in recording.requests}
    assert {"/before", "/after", "/hold"} <= records.keys()
    assert (
        waits([records["/before"], records["/after"], records["/hold"]])["/after"]["event_loop"]
        >= 200
    )


def test_loops_side_by_side_are_told_apart(recording: Recording) -> None:
    """While one loop is held, who is served on another one in the same process waits for nobody."""
    begin = threading.Barrier(2)

    def serve(app: App, path: str, loop: Callable[[], Any]) -> None:
        with asyncio.Runner(loop_factory=loop) as runner:
            begin.wait(20)
            runner.run(request(recording, app, path))

    with ThreadPoolExecutor(2) as pool:
        for done in [
            pool.submit(serve, nap, "/nap", LOOPS[0]),
            pool.submit(serve, hold, "/hold", LOOPS[1]),
        ]:
            done.result(20)

    records = {record.path: record for record in recording.requests}
    loops = {
        fact.loop for record in records.values() for fact in record.wait_facts if fact.kind == "ran"
    }
    assert longest(list(records["/hold"].wait_facts), "ran") >= 290
    assert len(loops) == 2
    assert waits(list(records.values()))["/nap"].get("event_loop", 0) < 150


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("loop", LOOPS)
def test_a_thread_that_dies_in_a_stage(recording: Recording, loop: Callable[[], Any]) -> None:
    """The stage ends with its thread; who waited for it in vain has no time of the next worker's."""

    def die() -> None:
        with stage("inference"):
            time.sleep(0.05)
            raise SystemExit  # Ends a thread without a word.

    async def app() -> None:
        thread = threading.Thread(target=carry(die))
        thread.start()
        silent = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(silent, 0.2)
        thread.join()

    async def served_after() -> None:
        running = asyncio.get_running_loop()
        future = running.create_future()

        def work() -> None:
            with stage("inference"):
                time.sleep(0.1)
            running.call_soon_threadsafe(future.set_result, None)

        threading.Thread(target=work).start()
        await future

    async def main() -> None:
        await request(recording, app, "/died")
        await request(recording, served_after, "/after")

    with asyncio.Runner(loop_factory=loop) as runner:
        runner.run(main())

    died, after = sorted(recording.requests, key=lambda record: record.start_ns)
    (inference,) = [span for span in died.stages if span.stage == "inference"]
    assert 45 <= inference.self_ns // MS <= 150
    assert not inference.open
    assert after.self_ns()["inference"] >= 95 * MS
    waits([died, after])


def test_steps_of_the_wall_clock_change_nothing(
    recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waits are measured on the monotonic clock: an hour forth and back meanwhile is not in them."""
    hours = iter((1, -1) * 1_000)
    told = time.time
    monkeypatch.setattr(time, "time", lambda: told() + 3600 * next(hours))
    monkeypatch.setattr(time, "time_ns", lambda: int((told() + 3600 * next(hours)) * 1e9))

    async def both() -> None:
        await asyncio.gather(request(recording, nap, "/nap"), request(recording, hold, "/hold"))

    asyncio.run(both())
    records = recording.requests
    assert all(record.duration_ns < 20e9 for record in records)
    assert 200 <= waits(records)["/nap"]["event_loop"] < 20_000


@pytest.mark.parametrize("step_s", [-3600, 3600])
def test_a_monotonic_clock_with_a_fault_raises_nothing(
    recording: Recording, monkeypatch: pytest.MonkeyPatch, step_s: int
) -> None:
    """A clock that must not step does so within a request: it is served, no wait outlasts it."""
    readings = 0

    def faulty() -> int:
        nonlocal readings
        readings += 1
        return time.monotonic_ns() + (step_s * 10**9 if readings > 4 else 0)

    for module in (loop_waits, stamped_future, thread_clock, workers):
        monkeypatch.setattr(module, "_now", faulty)

    async def threaded() -> None:
        with stage("inference"):
            await asyncio.to_thread(time.sleep, 0.02)

    async def all_() -> None:
        await asyncio.gather(
            *(
                request(recording, app, f"/{number}")
                for number, app in enumerate((nap, hold, threaded))
            )
        )

    asyncio.run(all_())
    records = recording.requests
    assert readings > 4
    assert [record.status for record in records] == [200] * 3
    waits(records)


def test_a_process_that_gevent_has_patched_is_served(tmp_path: Path) -> None:
    """Threads and locks are greenlets' there: requests are served, and no wait is longer than they."""
    program = Path(__file__).with_name("gevent_served.py")
    served = subprocess.run(
        [sys.executable, program, tmp_path], capture_output=True, text=True, timeout=60, check=False,
        env=os.environ | {"STAGESCOPE_RAISE": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
    )  # fmt: skip
    assert served.returncode == 0, served.stderr
    told = json.loads(served.stdout)
    assert [one["status"] for one in told] == [200, 200, 200]
    for one in told:
        assert one["stages"]["inference"] >= 95
        assert 0 <= one["waited"] <= one["duration"]
