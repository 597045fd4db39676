"""What an agent does to the served app's latency: p50, p99 and maximum, paired with a bare server.

  python benchmarks/disturbance.py --seconds 20 --rate 300
  python benchmarks/disturbance.py --outage 600      the same after a back end's outage

Cases: agent off, embedded, embedded with OTLP in a load run. Bare and instrumented server run at
once and are asked in turn, so that what the machine does meanwhile meets both.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import aiohttp

sys.path.insert(0, str(Path(__file__).parents[1]))  # the stand-in of a back end is the tests'

from tests.support.otlp import Behaviour, OtlpReceiver

APP = """
from fastapi import FastAPI
app = FastAPI()
@app.get("/")
def answer(): return 1
"""
WITH_STAGES = APP + "from stagescope import StageMiddleware\napp.add_middleware(StageMiddleware)\n"


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as found:
        return int(found.getsockname()[1])


def start(folder: Path, source: str, port: int, environ: dict[str, str]) -> subprocess.Popen[bytes]:
    """Start uvicorn with an app of that source."""
    name = f"app{port}"
    (folder / f"{name}.py").write_text(source)
    return subprocess.Popen(
        [sys.executable, "-m", "uvicorn", f"{name}:app", "--port", str(port), "--no-access-log",
         "--log-level", "warning"],
        cwd=folder, env=os.environ | environ,
    )  # fmt: skip


async def measure(ports: list[int], seconds: float, rate: float) -> list[list[float]]:
    """Ask each port in turn on an open schedule; returns the latencies of each in ms."""
    taken: list[list[float]] = [[] for _ in ports]
    headers = {"baggage": "stagescope.run=disturbance"}

    async def ask(session: aiohttp.ClientSession, which: int) -> None:
        began = time.perf_counter()
        async with session.get(f"http://127.0.0.1:{ports[which]}/", headers=headers) as answer:
            await answer.read()
        taken[which].append((time.perf_counter() - began) * 1e3)

    async with aiohttp.ClientSession() as session, asyncio.TaskGroup() as tasks:
        first = time.perf_counter()
        for number in range(int(seconds * rate)):
            await asyncio.sleep(max(0.0, first + number / rate - time.perf_counter()))
            for which in range(len(ports)):
                tasks.create_task(ask(session, which))
    return taken


async def wait_served(port: int) -> None:
    """Wait until somebody listens."""
    for _ in range(400):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(0.1)
        else:
            writer.close()
            return
    raise TimeoutError(f"nobody listens on {port}")


async def run_case(name: str, environ: dict[str, str], args: argparse.Namespace) -> None:
    """Measure one case and print its rows."""
    with tempfile.TemporaryDirectory(prefix="disturbance-") as text, OtlpReceiver() as receiver:
        folder = Path(text)
        environ = environ | {"STAGESCOPE_SPOOL": str(folder / "spool")}
        if environ.pop("otlp", ""):
            environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = receiver.http_endpoint
        ports = [free_port(), free_port()]
        servers = [
            start(folder, APP, ports[0], {}),
            start(folder, WITH_STAGES, ports[1], environ),
        ]
        try:
            for port in ports:
                await wait_served(port)
            await measure(ports, 2.0, args.rate)
            if args.outage:
                receiver.behave(Behaviour.REFUSE)
                await measure(ports, args.outage, args.rate)
                receiver.behave(Behaviour.OK)
            for which, latencies in zip(
                ("bare", name), await measure(ports, args.seconds, args.rate), strict=True
            ):
                p99 = statistics.quantiles(latencies, n=100)[98]
                print(f"{which:<24}{statistics.median(latencies):8.2f}{p99:8.2f}"
                      f"{max(latencies):8.2f}   n={len(latencies)}", flush=True)  # fmt: skip
        finally:
            for server in servers:
                server.terminate()
                server.wait()


def main() -> None:
    """Measure every case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="measured time of each case")
    parser.add_argument(
        "--rate", type=float, default=200.0, help="requests a second to each server"
    )
    parser.add_argument("--outage", type=float, default=0.0, help="seconds of outage before it")
    args = parser.parse_args()
    print(f"{'ms':<24}{'p50':>8}{'p99':>8}{'max':>8}")
    for name, environ in (
        ("agent off", {"STAGESCOPE_AGENT": "off"}),
        ("embedded", {}),
        ("embedded, OTLP, load run", {"otlp": "1"}),
    ):
        asyncio.run(run_case(name, environ, args))


if __name__ == "__main__":
    main()
