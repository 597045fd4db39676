"""What an agent does to the served app's latency: p50, p99 and maximum, paired with a bare server.

  python benchmarks/disturbance.py --seconds 20 --rate 200
  python benchmarks/disturbance.py --outage 600      the same after a back end's outage
  python benchmarks/disturbance.py --case beside     one case alone

Bare and instrumented server run at once and are asked in turn, half a period apart, so that
what the machine does meanwhile meets both. Every request is of a load run that is opened as a
driver opens it, so every span is kept and stacks are sampled; the back end is a process that reads
what it is sent and looks at nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from stagescope.agent.api.client import AgentClient
from stagescope.load_run.locate import AgentLocation, opened_run
from stagescope.loadgen.target import target
from stagescope.recorder.spool import SOCKET_NAME

RUN = "disturbance"
WARM_UP_S = 6.0
APP = """
from fastapi import FastAPI
app = FastAPI()
@app.get("/")
def answer(): return 1
"""
WITH_STAGES = APP + "from stagescope import StageMiddleware\napp.add_middleware(StageMiddleware)\n"
BACK_END = """
import sys, time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_POST(self):
        size = len(self.rfile.read(int(self.headers["Content-Length"])))
        refuses = Path(sys.argv[2]).exists()
        if not refuses:
            with open(sys.argv[3], "a") as taken:
                taken.write(f"{time.monotonic()} {size}\\n")
        self.send_response(503 if refuses else 200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *args):
        pass

ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


@dataclass(frozen=True, slots=True)
class Case:
    """One way to run an agent."""

    name: str
    agent: str
    """For `STAGESCOPE_AGENT`."""
    exports: bool = False
    beside: bool = False
    """The agent is a process of its own, started by hand."""


CASES = (
    Case("agent off", "off"),
    Case("embedded", ""),
    Case("embedded, OTLP", "", exports=True),
    Case("beside, OTLP", "off", exports=True, beside=True),
)


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


class Processes:
    """What one case runs, all of it ended by `close`."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.outage = folder / "outage"
        """The back end refuses while this file is there."""
        self.taken = folder / "taken"
        """A line for each request that the back end took: its time and its size."""
        self.spool = folder / "spool"
        back_end, *self.ports = (free_port() for _ in range(3))
        endpoint = {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{back_end}"}
        environ = {
            "STAGESCOPE_SPOOL": str(self.spool),
            "STAGESCOPE_AGENT": case.agent,
            **(endpoint if case.exports else {}),
        }
        self._folder = folder
        self._started = [
            self._start({}, "-c", BACK_END, str(back_end), str(self.outage), str(self.taken)),
            self._serve(APP, self.ports[0], {}),
            self._serve(WITH_STAGES, self.ports[1], environ),
        ]
        if case.beside:
            self._started.append(
                self._start(environ, "-m", "stagescope", "agent", "--quiet", "--metrics-port", "0")
            )

    def _serve(self, source: str, port: int, environ: dict[str, str]) -> subprocess.Popen[bytes]:
        (self._folder / f"app{port}.py").write_text(source)
        return self._start(
            environ, "-m", "uvicorn", f"app{port}:app", "--port", str(port), "--no-access-log",
            "--log-level", "warning",
        )  # fmt: skip

    def _start(self, environ: dict[str, str], *words: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, *words], cwd=self._folder, env=os.environ | environ
        )

    def close(self) -> None:
        """End them, what was started last first."""
        for process in reversed(self._started):
            helpers = psutil.Process(process.pid).children()
            process.terminate()
            process.wait()
            psutil.wait_procs(helpers, timeout=10)  # which send what is left


async def measure(ports: list[int], seconds: float, rate: float) -> list[list[float]]:
    """Ask each port in turn on an open schedule; returns the latencies of each in ms."""
    taken: list[list[float]] = [[] for _ in ports]
    headers = {"baggage": f"stagescope.run={RUN}"}

    async def ask(session: aiohttp.ClientSession, which: int) -> None:
        began = time.perf_counter()
        async with session.get(f"http://127.0.0.1:{ports[which]}/", headers=headers) as answer:
            await answer.read()
        taken[which].append((time.perf_counter() - began) * 1e3)

    # uvicorn closes what was idle for 5 s, perhaps just when it is used again.
    idle = aiohttp.TCPConnector(keepalive_timeout=2.0)
    async with aiohttp.ClientSession(connector=idle) as session, asyncio.TaskGroup() as tasks:
        first = time.perf_counter()
        for number in range(int(seconds * rate) * len(ports)):
            # Half a period apart, so that neither waits for the other.
            await asyncio.sleep(max(0.0, first + number / rate / len(ports) - time.perf_counter()))
            tasks.create_task(ask(session, number % len(ports)))
    return taken


async def wait_until(is_so: Callable[[], bool], what: str) -> None:
    """Wait half a minute at most."""
    for _ in range(300):
        if is_so():
            return
        await asyncio.sleep(0.1)
    raise TimeoutError(what)


def is_served(port: int) -> bool:
    """Return whether somebody listens."""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def export_rate(taken: Path, since: float, until: float, window: float) -> float:
    """Return the most kB a second that the back end took in any *window* seconds of that time."""
    lines = [line.split() for line in taken.read_text().splitlines()] if taken.exists() else []
    sizes = [(float(at), int(size)) for at, size in lines if since <= float(at) < until]
    firsts = [since + step for step in range(max(1, int(until - since - window) + 1))]
    return max(
        sum(size for at, size in sizes if first <= at < first + window) / window / 1e3
        for first in firsts
    )


async def run_case(case: Case, args: argparse.Namespace) -> None:
    """Measure one case and print its rows."""
    with tempfile.TemporaryDirectory(prefix="disturbance-") as folder:
        processes = Processes(case, Path(folder))
        try:
            for port in processes.ports:
                await wait_until(lambda port=port: is_served(port), f"port {port}")  # type: ignore[misc]
            if case.beside or case.agent != "off":
                await wait_until((processes.spool / SOCKET_NAME).exists, "the agent")
            aim = target(f"http://127.0.0.1:{processes.ports[1]}/")
            with opened_run(AgentLocation(processes.spool), aim, RUN):
                await measure_case(case, processes, args)
        finally:
            processes.close()


async def measure_case(case: Case, processes: Processes, args: argparse.Namespace) -> None:
    """Warm up, perhaps let the back end fail, and measure."""
    began = time.monotonic()
    await measure(processes.ports, WARM_UP_S, args.rate)
    over = time.monotonic()
    if args.outage:
        processes.outage.touch()
        await measure(processes.ports, args.outage, args.rate)
        processes.outage.unlink()
    back = time.monotonic()
    latencies = await measure(processes.ports, args.seconds, args.rate)
    for which, taken in zip(("bare", case.name), latencies, strict=True):
        p99 = statistics.quantiles(taken, n=100)[98]
        print(f"{which:<24}{statistics.median(taken):8.2f}{p99:8.2f}"
              f"{max(taken):8.2f}   n={len(taken)}", flush=True)  # fmt: skip
    if args.outage and case.exports:
        steady = export_rate(processes.taken, began + 2, over, over - began - 2)
        most = export_rate(processes.taken, back, time.monotonic(), 5.0)
        print(f"  exports, kB/s: {steady:.0f} before the outage, {most:.0f} at most in 5 s after it "
              f"({most / steady:.1f} times)", flush=True)  # fmt: skip
        tell_losses(processes.spool)


def tell_losses(spool: Path) -> None:
    """Print what became of all records and spans, by the agent's own counters."""
    counts = AgentClient(spool / SOCKET_NAME).counters()
    print(
        f"  records: {counts['records']:.0f} read, "
        f"{counts['overwritten'] + counts['lost']:.0f} written over unread\n"
        f"  spans: {counts['otlp_sent_spans']:.0f} sent, "
        + ", ".join(
            f"{value:.0f} {name.removeprefix('otlp_')}"
            for name, value in counts.items()
            if value and name.startswith(("otlp_dropped", "otlp_rejected"))
        ),
        flush=True,
    )


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of each case")
    parser.add_argument(
        "--rate", type=float, default=200.0, help="requests a second to each server"
    )
    parser.add_argument("--outage", type=float, default=0.0, help="seconds of outage before it")
    parser.add_argument("--case", default="", help="only cases whose name begins so")
    args = parser.parse_args()
    print(f"{'ms':<24}{'p50':>8}{'p99':>8}{'max':>8}")
    for case in CASES:
        if case.name.startswith(args.case):
            asyncio.run(run_case(case, args))


if __name__ == "__main__":
    main()
