"""Waits of the process: how late the loop is, seen by its own timer."""

from __future__ import annotations

import asyncio
import gc
import time
from pathlib import Path

from stagescope.middleware.watch import watch
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
