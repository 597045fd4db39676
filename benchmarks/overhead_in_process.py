"""The cost of each instrument inside the process: no network, blocks of requests interleaved."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from overhead_apps import Built, CountingExporter, fastapi_apps, raw_apps

from stagescope.middleware.types import ASGIApp, Message, Scope

WARM_UP = 300
TRACEPARENT = b"00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
HEADERS = [
    (b"host", b"127.0.0.1:8000"),
    (b"user-agent", b"python-aiohttp/3.14"),
    (b"accept", b"*/*"),
    (b"accept-encoding", b"gzip, deflate"),
    (b"content-type", b"application/json"),
    (b"content-length", b"13"),
    (b"connection", b"keep-alive"),
    (b"traceparent", TRACEPARENT),
]
BAGGAGE = (b"baggage", b"stagescope.run=r-20261123-1")

WHAT = {
    "bare": "bare ASGI app",
    "stagescope-0": "stagescope, no stage of the app's",
    "stagescope-6": "stagescope, six stages",
    "stagescope-6-run": "stagescope, six stages, in a load run",
    "otel-asgi-0": "OpenTelemetry ASGI",
    "otel-asgi-5": "OpenTelemetry ASGI, five child spans",
    "fastapi-bare": "bare FastAPI app",
    "fastapi-stagescope-6": "stagescope, six stages",
    "fastapi-starlette-exporter": "starlette-exporter",
    "fastapi-otel-asgi-5": "OpenTelemetry ASGI, five child spans",
    "fastapi-otel-native-5": "FastAPI's OpenTelemetry, five child spans",
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and quartiles over the rounds, µs a request."""

    median_us: float
    q1_us: float
    q3_us: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        """Sum up *values*, one a round, two at least."""
        q1, _, q3 = quantiles(values, n=4, method="inclusive")
        return cls(round(median(values), 3), round(q1, 3), round(q3, 3))


@dataclass(frozen=True, slots=True)
class InProcess:
    """One line of the table; *over_bare* is the paired difference, round by round."""

    variant: str
    what: str
    bare: str
    cost: Spread
    over_bare: Spread | None
    spans_per_request: float


@dataclass(slots=True)
class _Lane:
    variant: str
    app: ASGIApp
    headers: list[tuple[bytes, bytes]]
    settle: Callable[[], object]
    exporter: CountingExporter | None
    driven: int = 0
    us: list[float] = field(default_factory=list)


async def _receive() -> Message:
    return {"type": "http.request", "body": b'{"image": ""}', "more_body": False}


async def _send(message: Message) -> None:
    return None


async def _drive(lane: _Lane, requests: int) -> None:
    app = lane.app
    for _ in range(requests):
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 50000),
            "scheme": "http",
            "root_path": "",
            "method": "POST",
            "path": "/predict",
            "raw_path": b"/predict",
            "query_string": b"",
            "headers": [*lane.headers],
        }
        await app(scope, _receive, _send)
    lane.driven += requests


async def _block(lane: _Lane, requests: int) -> None:
    """Time one block.

    CPU time of the whole process: on a busy machine it leaves out what others take, and it
    counts the threads of an exporter. Garbage is collected before, and as ever within.
    """
    gc.collect()
    before = time.process_time_ns()
    await _drive(lane, requests)
    lane.settle()
    lane.us.append((time.process_time_ns() - before) / requests / 1000)


def _lane(variant: str, built: Built) -> _Lane:
    app, traced = built
    headers = [*HEADERS, BAGGAGE] if variant.endswith("-run") else HEADERS
    if traced is None:
        return _Lane(variant, app, headers, lambda: None, None)
    provider, exporter = traced
    return _Lane(variant, app, headers, provider.force_flush, exporter)


async def _rounds(
    lanes: list[_Lane], rounds: int, requests: int, tell: Callable[[int], object]
) -> None:
    for lane in lanes:
        await _drive(lane, WARM_UP)
        lane.settle()
    gc.collect()
    gc.freeze()  # What was imported is no part of any variant's garbage.
    for number in range(rounds):
        turn = number % len(lanes)
        for lane in lanes[turn:] + lanes[:turn]:
            await _block(lane, requests)
        tell(number + 1)
    gc.unfreeze()


def measure(
    spool: Path, rounds: int, requests: int, tell: Callable[[int], object]
) -> list[InProcess]:
    """Drive every variant in turn, *rounds* times *requests*; *tell* hears each finished round."""
    built = raw_apps(spool) | fastapi_apps(spool)
    lanes = [_lane(variant, one) for variant, one in built.items()]
    asyncio.run(_rounds(lanes, rounds, requests, tell))
    for _, traced in built.values():
        if traced is not None:
            traced[0].shutdown()
    by_name = {lane.variant: lane for lane in lanes}
    return [_sum_up(lane, by_name) for lane in lanes]


def _sum_up(lane: _Lane, lanes: dict[str, _Lane]) -> InProcess:
    bare = "fastapi-bare" if lane.variant.startswith("fastapi-") else "bare"
    over = None
    if lane.variant != bare:
        over = Spread.of([us - least for us, least in zip(lane.us, lanes[bare].us, strict=True)])
    spans = lane.exporter.spans / lane.driven if lane.exporter else 0.0
    return InProcess(
        lane.variant, WHAT[lane.variant], bare, Spread.of(lane.us), over, round(spans, 2)
    )
