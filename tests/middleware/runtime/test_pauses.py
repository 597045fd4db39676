"""Waits of the process: how late the loop is, seen by its own timer."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path

from stagescope.middleware.runtime.pauses import GilWatch, watch
from stagescope.middleware.stage import stage
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording


def test_a_blocked_loop_is_late(tmp_path: Path) -> None:
    """Code that blocks the loop for 300 ms shows as a lag of at least 200 ms (a tick is 100)."""
    recording = Recording(tmp_path)

    async def block() -> None:
        watch(recording.recorder)
        asyncio.get_running_loop().call_soon(time.sleep, 0.3)
        while not recording.reader.waits()["loop_ticks"]:
            await asyncio.sleep(0.01)

    asyncio.run(block())

    assert recording.reader.waits()["loop_lag_max_ns"] >= 190_000_000
    recording.close()


def test_a_stall_of_the_loop_is_laid_over_the_stage_that_it_overlaps(tmp_path: Path) -> None:
    """A request that waits while other code blocks the loop is told for how long, and where."""
    recording = Recording(tmp_path)

    async def block() -> None:
        watch(recording.recorder)
        with recording.request(), stage("queue"):
            asyncio.get_running_loop().call_soon(time.sleep, 0.3)
            while not recording.reader.waits()["loop_ticks"]:
                await asyncio.sleep(0.01)

    asyncio.run(block())
    (record,) = recording.requests
    recording.close()

    (stall,) = [stall for stall in record.stalls if stall.cause == "loop"]
    assert (stall.opening, stall.stage) == (0, "queue")
    assert 190_000_000 <= stall.stall_ns <= record.stages[0].self_ns


def test_the_wait_for_the_interpreters_lock_is_estimated(tmp_path: Path) -> None:
    """A reading beside a thread that computes waits longer than the shortest one did."""
    recording = Recording(tmp_path)
    gil = GilWatch(recording.recorder)
    gil.read()
    assert recording.reader.waits()["gil_wait_ns"] == 0
    stop = threading.Event()

    def compute() -> None:
        while not stop.is_set():
            sum(range(1_000))

    busy = threading.Thread(target=compute)
    busy.start()

    def waited() -> bool:
        gil.read()
        # The interpreter lets a waiting thread in after 5 ms.
        return recording.reader.waits()["gil_wait_max_ns"] > 2_000_000

    wait_until(waited)
    stop.set()
    busy.join()
    figures = recording.reader.waits()
    recording.close()

    assert figures["gil_ticks"] >= 2
    assert figures["gil_wait_ns"] >= figures["gil_wait_max_ns"]
    assert figures["gil_cost_ns"] > 0


def test_a_closed_recorder_is_left_alone(tmp_path: Path) -> None:
    """The collector's callback goes with the recorder that it told."""
    recording = Recording(tmp_path)
    before = list(gc.callbacks)
    watch(recording.recorder)
    (added,) = [callback for callback in gc.callbacks if callback not in before]
    recording.recorder.close()

    def gone_after_a_collection() -> bool:
        gc.collect()
        return added not in gc.callbacks

    wait_until(gone_after_a_collection)
    recording.close()
