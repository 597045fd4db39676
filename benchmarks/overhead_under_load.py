"""CPU time of the whole server process for a request, under a real uvicorn and a steady load."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import aiohttp
import psutil
from overhead_in_process import BAGGAGE, HEADERS, RUN, Spread, opened

SETTLE_S = 1.2
"""After each turn: what was put off (a drain, an export) still belongs to it."""
ANSWER_S = 5.0
WHAT = {
    "bare": "bare ASGI app",
    "agent-off": "stagescope, six stages, nobody reads",
    "agent-off-run": "stagescope, six stages, nobody reads, in an opened load run",
    "agent-thread": "stagescope, six stages, agent on a thread",
    "agent-process": "stagescope, six stages, agent process beside",
    "otel-otlp": "OpenTelemetry ASGI, five child spans, OTLP/HTTP",
    "def-bare": "bare FastAPI app, a def endpoint",
    "def-off": "stagescope with its hooks, a def endpoint, nobody reads",
    "def-off-run": "stagescope with its hooks, a def endpoint, nobody reads, in an opened load run",
}
NEEDS = {"agent-thread": "stagescope.embedded", "agent-process": "stagescope.agent.loop"}
"""Modules without which a variant cannot run; it is then listed as absent."""


@dataclass(frozen=True, slots=True)
class UnderLoad:
    """One line of the table. *beside* is the CPU time of the agent's own process."""

    variant: str
    what: str
    absent: str
    requests: int = 0
    cost: Spread | None = None
    over_bare: Spread | None = None
    beside: Spread | None = None


@dataclass(slots=True)
class _Lane:
    variant: str
    server: subprocess.Popen[str]
    agent: psutil.Process | None
    requests: int = 0
    us: list[float] = field(default_factory=list)
    beside_us: list[float] = field(default_factory=list)
    url: str = ""
    headers: dict[str, str] = field(default_factory=dict[str, str])

    def wait_for_port(self) -> None:
        """Read the port that the server prints once it listens."""
        assert self.server.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.server.stdout.readline())}"


class _Sink(BaseHTTPRequestHandler):
    """Takes OTLP and says thank you."""

    def do_POST(self) -> None:
        """Read the body, answer 200."""
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@contextmanager
def _sink() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Sink)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def _process(*command: str, environment: dict[str, str]) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen(
        [sys.executable, *command], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        yield child
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _start(stack: ExitStack, variant: str, spools: Path, sink: str) -> _Lane:
    spool = spools / variant
    source = str(Path(__file__).parent.parent / "src")
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]),
        "STAGESCOPE_SPOOL": str(spool),
        "OTEL_EXPORTER_OTLP_ENDPOINT": sink,
        # The default of 5 s would put an export into another variant's turn.
        "OTEL_BSP_SCHEDULE_DELAY": "500",
    }
    agent = None
    if variant == "agent-process":
        command = ("-m", "stagescope", "agent", "--spool", str(spool), "--quiet")
        environment.pop("OTEL_EXPORTER_OTLP_ENDPOINT")
        agent = psutil.Process(stack.enter_context(_process(*command, environment=environment)).pid)
    elif variant == "agent-thread":
        environment.pop("OTEL_EXPORTER_OTLP_ENDPOINT")
        environment["STAGESCOPE_AGENT"] = "thread"
    named = {}
    if variant.endswith("-run"):
        stack.enter_context(opened(spool, RUN))
        named = {BAGGAGE[0].decode(): BAGGAGE[1].decode()}
    server = str(Path(__file__).with_name("overhead_server.py"))
    child = stack.enter_context(_process(server, variant, environment=environment))
    return _Lane(variant, child, agent, headers=_HEADERS | named)


async def _post(client: aiohttp.ClientSession, lane: _Lane) -> None:
    url, headers = f"{lane.url}/predict", lane.headers
    async with client.post(url, data=b'{"image": ""}', headers=headers) as reply:
        await reply.read()
        reply.raise_for_status()


_HEADERS = {"content-type": "application/json", "traceparent": HEADERS[-1][1].decode()}


async def _load(client: aiohttp.ClientSession, lane: _Lane, rate: float, seconds: float) -> int:
    """Send at a steady rate on an absolute schedule; give the number of requests."""
    loop = asyncio.get_running_loop()
    requests = max(1, int(rate * seconds))
    begin = loop.time()
    async with asyncio.TaskGroup() as sends:
        for number in range(requests):
            await asyncio.sleep(max(0.0, begin + number / rate - loop.time()))
            sends.create_task(_post(client, lane))
    return requests


async def _cpu_ns(client: aiohttp.ClientSession, url: str) -> int:
    async with client.get(f"{url}/cpu") as reply:
        return int(await reply.text())


def _agent_s(lane: _Lane) -> float:
    if lane.agent is None:
        return 0.0
    times = lane.agent.cpu_times()
    return times.user + times.system


async def _turn(
    client: aiohttp.ClientSession, lane: _Lane, rate: float, seconds: float, settle_s: float
) -> None:
    cpu, agent = await _cpu_ns(client, lane.url), _agent_s(lane)
    requests = await _load(client, lane, rate, seconds)
    await asyncio.sleep(settle_s)
    lane.us.append((await _cpu_ns(client, lane.url) - cpu) / requests / 1000)
    lane.beside_us.append((_agent_s(lane) - agent) / requests * 1e6)
    lane.requests += requests


async def _turns(
    lanes: list[_Lane], rounds: int, rate: float, seconds: float, settle_s: float,
    tell: Callable[[int], object],
) -> None:  # fmt: skip
    timeout = aiohttp.ClientTimeout(total=ANSWER_S)
    connector = aiohttp.TCPConnector(limit=32)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as client:
        for lane in lanes:
            await _load(client, lane, 200, 0.2)
        for number in range(rounds):
            turn = number % len(lanes)
            for lane in lanes[turn:] + lanes[:turn]:
                await _turn(client, lane, rate, seconds, settle_s)
            tell(number + 1)


def absent(variant: str) -> str:
    """Say why a variant cannot be measured here; empty where it can."""
    needed = NEEDS.get(variant)
    if needed is None or find_spec(needed) is not None:
        return ""
    return f"no module {needed}"


def measure(
    spools: Path, rounds: int, rate: float, seconds: float, settle_s: float,
    tell: Callable[[int], object],
) -> list[UnderLoad]:  # fmt: skip
    """Drive each server in turn, *rounds* times for *seconds* at *rate* a second."""
    with ExitStack() as stack:
        sink = stack.enter_context(_sink())
        lanes = [_start(stack, variant, spools, sink) for variant in WHAT if not absent(variant)]
        for lane in lanes:  # All start at the same time, and then one waits.
            lane.wait_for_port()
        asyncio.run(_turns(lanes, rounds, rate, seconds, settle_s, tell))
    by_name = {lane.variant: lane for lane in lanes}
    return [_sum_up(variant, by_name) for variant in WHAT]


def _sum_up(variant: str, lanes: dict[str, _Lane]) -> UnderLoad:
    lane = lanes.get(variant)
    if lane is None:
        return UnderLoad(variant, WHAT[variant], absent(variant))
    over = None
    bare = "def-bare" if variant.startswith("def-") else "bare"
    if variant != bare:
        over = Spread.of([us - least for us, least in zip(lane.us, lanes[bare].us, strict=True)])
    beside = Spread.of(lane.beside_us) if lane.agent else None
    return UnderLoad(variant, WHAT[variant], "", lane.requests, Spread.of(lane.us), over, beside)
