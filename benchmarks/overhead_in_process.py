"""The cost of each instrument inside the process: no network, blocks of requests interleaved."""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

from overhead_apart import APART, Apart
from overhead_apps import Built, CountingExporter, fastapi_apps, raw_apps

from stagescope.load_run.locate import AgentLocation, opened_run
from stagescope.loadgen.target import target
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
RUN = "r-20261123-1"
BAGGAGE = (b"baggage", b"stagescope.run=" + RUN.encode())

WHAT = {
    "bare": "bare ASGI app",
    "stagescope-0": "stagescope, no stage of the app's",
    "stagescope-6": "stagescope, six stages",
    "stagescope-6-run": "stagescope, six stages, in an opened load run",
    "otel-asgi-0": "OpenTelemetry ASGI",
    "otel-asgi-5": "OpenTelemetry ASGI, five child spans",
    "fastapi-bare": "bare FastAPI app",
    "fastapi-stagescope-6": "stagescope, six stages",
    "fastapi-starlette-exporter": "starlette-exporter",
    "fastapi-otel-asgi-5": "OpenTelemetry ASGI, five child spans",
    "fastapi-otel-native-5": "FastAPI's OpenTelemetry, five child spans",
    "apart-bare": "bare FastAPI app",
    "apart-hooks-0": "stagescope with its hooks, no stage of the app's",
    "apart-hooks-6": "stagescope with its hooks, six stages",
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
class Lane:
    """One variant, and what its blocks cost so far."""

    variant: str
    app: ASGIApp
    headers: list[tuple[bytes, bytes]] = field(default_factory=lambda: HEADERS)
    settle: Callable[[], object] = lambda: None
    exporter: CountingExporter | None = None
    driven: int = 0
    us: list[float] = field(default_factory=list)


@contextmanager
def opened(spool: Path, run: str) -> Iterator[None]:
    """Open *run* in *spool*, as the load driver does where there is no agent to ask."""
    spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    nobody_listens = target("http://127.0.0.1:1/")
    with opened_run(AgentLocation(spool), nobody_listens, run):
        if not any(spool.glob(f"*/{run}*")):
            raise RuntimeError(f"the run was not opened in {spool}")
        yield


async def _receive() -> Message:
    return {"type": "http.request", "body": b'{"image": ""}', "more_body": False}


async def _send(message: Message) -> None:
    return None


async def drive(lane: Lane, requests: int) -> None:
    """Await the app *requests* times."""
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


async def block(lane: Lane, requests: int) -> None:
    """Time one block.

    CPU time of the whole process: on a busy machine it leaves out what others take, and it
    counts the threads of an exporter. Garbage is collected before, and as ever within.
    """
    gc.collect()
    before = time.process_time_ns()
    await drive(lane, requests)
    lane.settle()
    lane.us.append((time.process_time_ns() - before) / requests / 1000)


def _lane(variant: str, built: Built) -> Lane:
    app, traced = built
    if traced is None:
        return Lane(variant, app)
    provider, exporter = traced
    return Lane(variant, app, HEADERS, provider.force_flush, exporter)


async def _rounds(
    lanes: list[Lane],
    apart: dict[str, tuple[Apart, list[float]]],
    rounds: int,
    requests: int,
    tell: Callable[[int], object],
) -> None:
    for lane in lanes:
        await drive(lane, WARM_UP)
        lane.settle()
    gc.collect()
    gc.freeze()  # What was imported is no part of any variant's garbage.
    for number in range(rounds):
        turn = number % len(lanes)
        for lane in lanes[turn:] + lanes[:turn]:
            await block(lane, requests)
        for child, us in apart.values():
            us.append(child(requests))
        tell(number + 1)
    gc.unfreeze()


def measure(
    spool: Path, rounds: int, requests: int, tell: Callable[[int], object]
) -> list[InProcess]:
    """Drive every variant in turn, *rounds* times *requests*; *tell* hears each finished round."""
    built = raw_apps(spool) | fastapi_apps(spool)
    lanes = [_lane(variant, one) for variant, one in built.items()]
    with ExitStack() as children:
        apart: dict[str, tuple[Apart, list[float]]] = {
            variant: (children.enter_context(Apart(variant, spool)), []) for variant in APART
        }
        asyncio.run(_rounds(lanes, apart, rounds, requests, tell))
    for _, traced in built.values():
        if traced is not None:
            traced[0].shutdown()
    us = {lane.variant: lane.us for lane in lanes} | {name: own for name, (_, own) in apart.items()}
    spans = {lane.variant: lane.exporter.spans / lane.driven for lane in lanes if lane.exporter}
    return [_sum_up(variant, us, spans.get(variant, 0.0)) for variant in us]


def _sum_up(variant: str, us: dict[str, list[float]], spans: float) -> InProcess:
    family = variant.partition("-")[0]
    bare = f"{family}-bare" if family in ("fastapi", "apart") else "bare"
    over = None
    if variant != bare:
        over = Spread.of([own - least for own, least in zip(us[variant], us[bare], strict=True)])
    return InProcess(variant, WHAT[variant], bare, Spread.of(us[variant]), over, round(spans, 2))
