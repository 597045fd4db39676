"""What watching a server costs it: throughput and p99, with nothing, the agent, stacks, and py-spy.

python benchmarks/agent_cost.py --rounds 8 --seconds 5

One server process runs through all of it, on a core of its own; the clients and whoever watches
share the others. Turns of all variants alternate, in an order that rotates, and each is compared
with the turn of the same round in which nobody watched. Clients send the next request when they
have the last answer (closed loop), so throughput is what the server can do.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

CLIENTS = 8
SETTLE_S = 2.0
"""From the start of a watcher until its turn begins: an agent attaches, py-spy reads symbols."""
RUN = "agent-cost"
_BODY = json.dumps({"numbers": list(range(2048))}).encode()

WHAT = {
    "off": "nobody watches",
    "agent": "agent, default samplers, no stacks",
    "stacks": "agent, default samplers, stacks as in a load run",
    "py-spy": "py-spy record, as it comes (blocking, 100/s)",
    "py-spy-native": "py-spy record --native (blocking, 100/s)",
}


@dataclass(slots=True)
class Lane:
    """What the turns of one variant gave."""

    throughput: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    watcher_cores: list[float] = field(default_factory=list)
    """CPU of whoever watched, children too, in cores."""


def _command(variant: str, pid: int, spool: Path, seconds: float) -> list[str]:
    if variant in ("agent", "stacks"):
        return [sys.executable, "-m", "stagescope", "agent", "--spool", str(spool), "--quiet",
                "--metrics-port", "off"]  # fmt: skip
    py_spy = str(Path(sys.executable).with_name("py-spy"))
    record = [py_spy, "record", "--pid", str(pid), "--rate", "100", "--format", "raw",
              "--duration", str(int(seconds + SETTLE_S + 60)), "--output", str(spool / "raw")]  # fmt: skip
    return [*record, "--native"] if variant == "py-spy-native" else record


@contextmanager
def _watched(variant: str, server: psutil.Process, spool: Path, seconds: float) -> Iterator[int]:
    """Yield the pid of whoever watches, 0 where nobody does; he is ended afterwards."""
    if variant == "off":
        yield 0
        return
    environment = os.environ | {"STAGESCOPE_STACKS": "runs" if variant == "stacks" else "off"}
    with subprocess.Popen(
        _command(variant, server.pid, spool, seconds), env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    ) as watcher:  # fmt: skip
        try:
            yield watcher.pid
            if watcher.poll() is not None:
                raise SystemExit(f"{variant} ended by itself with {watcher.returncode}")
        finally:
            watcher.send_signal(signal.SIGINT)
            try:
                watcher.wait(15)
            except subprocess.TimeoutExpired:
                watcher.kill()


def _cpu_s(pid: int) -> float:
    """Return the CPU time of a process, of its children and of those that it has waited for."""
    if not pid:
        return 0.0
    me = psutil.Process(pid)
    own = me.cpu_times()
    total = own.user + own.system + own.children_user + own.children_system
    for child in me.children(recursive=True):
        try:
            times = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return float(total)


async def _client(
    session: aiohttp.ClientSession, url: str, until: float, took: list[float]
) -> None:
    while (begun := time.perf_counter()) < until:
        async with session.post(url, data=_BODY, headers=_HEADERS) as reply:
            await reply.read()
            reply.raise_for_status()
        took.append(time.perf_counter() - begun)


_HEADERS = {"content-type": "application/json", "baggage": f"stagescope.run={RUN}"}


async def _turn(url: str, seconds: float) -> list[float]:
    """Keep the server busy for *seconds*; give each request's latency, in seconds."""
    took: list[float] = []
    async with aiohttp.ClientSession() as session:
        until = time.perf_counter() + seconds
        await asyncio.gather(*[_client(session, url, until, took) for _ in range(CLIENTS)])
    return took


def _measure(
    variant: str, lane: Lane, server: psutil.Process, url: str, spool: Path, seconds: float
) -> None:
    with _watched(variant, server, spool, seconds) as pid:
        asyncio.run(_turn(url, SETTLE_S))
        before, begun = _cpu_s(pid), time.perf_counter()
        took = asyncio.run(_turn(url, seconds))
        lasted = time.perf_counter() - begun
        lane.watcher_cores.append((_cpu_s(pid) - before) / lasted)
    lane.throughput.append(len(took) / lasted)
    lane.p99_ms.append(statistics.quantiles(took, n=100)[98] * 1e3)


@contextmanager
def _server(spool: Path) -> Iterator[tuple[psutil.Process, str]]:
    """Start the server on the first core that we may use; we take the others."""
    cores = sorted(os.sched_getaffinity(0))
    environment = os.environ | {
        "STAGESCOPE_SPOOL": str(spool), "STAGESCOPE_AGENT": "off", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name("agent_cost_server.py"))]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as child:
        try:
            assert child.stdout is not None
            url = f"http://127.0.0.1:{int(child.stdout.readline())}/"
            process = psutil.Process(child.pid)
            if len(cores) > 1:
                _pin(child.pid, cores[:1])
                os.sched_setaffinity(0, cores[1:])
            yield process, url
        finally:
            child.terminate()


def _pin(pid: int, cores: Sequence[int]) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def _relative(lane: Lane, base: Lane) -> dict[str, Any]:
    def spread(values: Sequence[float]) -> list[float]:
        low, middle, high = statistics.quantiles(values, n=4)
        return [round(value, 4) for value in (low, middle, high)]

    pairs = zip(lane.throughput, base.throughput, strict=True)
    tails = zip(lane.p99_ms, base.p99_ms, strict=True)
    return {
        "requests_per_s": round(statistics.median(lane.throughput), 1),
        "p99_ms": round(statistics.median(lane.p99_ms), 2),
        "throughput_change_quartiles": spread([mine / bare - 1 for mine, bare in pairs]),
        "p99_change_quartiles": spread([mine / bare - 1 for mine, bare in tails]),
        "watcher_cores": round(statistics.median(lane.watcher_cores), 4),
    }


def _print(figures: dict[str, dict[str, Any]]) -> None:
    print("| who watches | requests/s | p99 ms | throughput | p99 | own CPU, cores |")
    print("| --- | --- | --- | --- | --- | --- |")
    for variant, of in figures.items():
        low, middle, high = of["throughput_change_quartiles"]
        low99, middle99, high99 = of["p99_change_quartiles"]
        print(
            f"| {WHAT[variant]} | {of['requests_per_s']} | {of['p99_ms']} "
            f"| {middle:+.1%} ({low:+.1%}…{high:+.1%}) "
            f"| {middle99:+.1%} ({low99:+.1%}…{high99:+.1%}) | {of['watcher_cores']} |"
        )


def main() -> None:
    """Measure, and print a table or JSON."""
    parser = argparse.ArgumentParser(description="What watching a server costs it.")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=5.0, help="of one turn")
    parser.add_argument("--variants", default=",".join(WHAT), help="with commas between")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    variants = ["off", *(v for v in args.variants.split(",") if v != "off")]
    lanes = {variant: Lane() for variant in variants}
    with tempfile.TemporaryDirectory() as folder, _server(Path(folder)) as (server, url):
        asyncio.run(_turn(url, 3.0))  # warm
        for number in range(args.rounds):
            at = number % len(variants)
            for variant in variants[at:] + variants[:at]:
                _measure(variant, lanes[variant], server, url, Path(folder), args.seconds)
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
    figures = {name: _relative(lane, lanes["off"]) for name, lane in lanes.items()}
    if args.json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)


if __name__ == "__main__":
    main()
