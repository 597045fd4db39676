"""Serves three requests of a load run in a process that gevent has patched, and prints their times, ms.

It is given the folder of the recorder file."""

from __future__ import annotations

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from gevent import monkey  # type: ignore[import-untyped]

    monkey.patch_all()

import asyncio
import json
import queue
import sys
import threading
import time
from pathlib import Path

from stagescope.agent.store.runs import RunStore
from stagescope.middleware.stage import stage
from stagescope.recorder.spool import RUNS_FOLDER
from stagescope.testing.recording import Recording
from tests.middleware.runtime.test_bad_surroundings import request, waits


async def awaited() -> None:
    """Sleep on the loop."""
    with stage("inference"):
        await asyncio.sleep(0.1)


async def in_a_thread() -> None:
    """Sleep in an executor, whose threads are greenlets."""
    with stage("inference"):
        await asyncio.get_running_loop().run_in_executor(None, time.sleep, 0.1)


async def by_a_worker() -> None:
    """Be answered by a worker that waits at a queue."""
    loop = asyncio.get_running_loop()
    future = loop.create_future()
    jobs: queue.Queue[asyncio.Future[None]] = queue.Queue()

    def work() -> None:
        job = jobs.get()
        time.sleep(0.1)
        loop.call_soon_threadsafe(job.set_result, None)

    threading.Thread(target=work).start()
    jobs.put(future)
    with stage("inference"):
        await future


async def main(recording: Recording) -> None:
    """Serve."""
    apps = (awaited, in_a_thread, by_a_worker)
    await asyncio.gather(
        *(request(recording, app, f"/{number}") for number, app in enumerate(apps))
    )


spool = Path(sys.argv[1])
recording = Recording(spool)
RunStore(spool / RUNS_FOLDER).open("run-1")
asyncio.run(main(recording))
records = recording.requests
told = waits(records)
print(
    json.dumps(
        [
            {
                "status": record.status,
                "duration": record.duration_ns / 1e6,
                "stages": {name: ns / 1e6 for name, ns in record.stage_ns().items()},
                "waited": sum(told[record.path].values()),
            }
            for record in records
        ]
    )
)
