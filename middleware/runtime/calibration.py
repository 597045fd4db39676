"""What the middleware costs in this process, measured here, once, when its recorder opens.

Requests of a do-nothing app are driven with and without the middleware on a recorder in plain
memory; no event loop is needed, because nothing in them waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from statistics import median
from typing import Any

from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.runtime.cold_start import aside
from stagescope.middleware.stage import stage
from stagescope.middleware.types import ASGIApp, Message, Receive, Scope, Send
from stagescope.recorder import format as fmt

ROUNDS = 60
STAGES_TIMED = 8


def calibrate(recorder: Recorder, around: Callable[[ASGIApp, Recorder], ASGIApp]) -> None:
    """Measure a request and a stage (about a millisecond in all) and write both to *recorder*."""
    slots = 4
    scratch = Recorder(
        memoryview(bytearray(fmt.file_bytes(slots, slots))), in_flight_slots=slots, ring_slots=slots
    )
    with aside():
        bare = _per_request_ns(_app)
        empty = _per_request_ns(around(_app, scratch))
        staged = _per_request_ns(around(_staged_app, scratch))
    scratch.close()
    recorder.write_cost(max(0, empty - bare), max(0, (staged - empty) // STAGES_TIMED))


def _per_request_ns(app: ASGIApp) -> int:
    return int(median(_once_ns(app) for _ in range(ROUNDS)))


def _once_ns(app: ASGIApp) -> int:
    scope: Scope = {
        "type": "http",
        "method": "POST",
        "path": "/",
        "raw_path": b"/",
        "headers": [(b"host", b"localhost"), (b"content-type", b"application/json")],
    }
    before = time.perf_counter_ns()
    request: Coroutine[Any, Any, None] = app(scope, _receive, _send)  # type: ignore[assignment]
    with suppress(StopIteration):
        request.send(None)
    return time.perf_counter_ns() - before


async def _app(scope: Scope, receive: Receive, send: Send) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def _staged_app(scope: Scope, receive: Receive, send: Send) -> None:
    for _ in range(STAGES_TIMED):
        with stage("inference"):
            pass
    await _app(scope, receive, send)


async def _receive() -> Message:
    return {"type": "http.request", "body": b"{}", "more_body": False}


async def _send(message: Message) -> None:
    return None
