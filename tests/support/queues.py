"""Run folders of queues whose waiting times are computed here, by recursions, not by simulation."""

from __future__ import annotations

import heapq
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from tests.support.runs import MS, client_row, example_run, server_row, write_run_folder

Floats = npt.NDArray[np.float64]
BEGIN_NS = 1_000 * MS


def arrivals(rate_per_s: float, count: int, seed: int) -> Floats:
    """Return Poisson arrivals, ms."""
    return np.cumsum(np.random.default_rng(seed).exponential(1e3 / rate_per_s, count))


def starts(at: Floats, spent: Floats, servers: int) -> Floats:
    """Return when each of them begins: first come, first served by so many servers (Kiefer-Wolfowitz)."""
    free = [0.0] * servers
    begun = np.zeros(len(at))
    for index in range(len(at)):
        begun[index] = max(at[index], heapq.heappop(free))
        heapq.heappush(free, begun[index] + spent[index])
    return begun


def services(mean_ms: float, spread: float, count: int, seed: int) -> Floats:
    """Return service times: *spread* is their coefficient of variation, 0: all the same."""
    if not spread:
        return np.full(count, mean_ms)
    shape = 1 / spread**2
    return np.random.default_rng(seed + 1_000).gamma(shape, mean_ms / shape, count)


def percentiles(at: Floats, spent: Floats, servers: int, after_ms: float) -> tuple[float, float]:
    """Return p50 and p99 of the time in such a queue and *after_ms* beyond it."""
    latency = starts(at, spent, servers) + spent - at + after_ms
    p50, p99 = np.quantile(latency, [0.5, 0.99])
    return float(p50), float(p99)


def loop_run(folder: Path, at: Floats, spent: Floats, after_ms: float) -> Path:
    """Write the run of a server whose `preprocess` runs on the loop and `inference` elsewhere."""
    return _run(folder, at, [
        _on_loop(a, b, s, after_ms)
        for a, b, s in zip(at, starts(at, spent, 1), spent, strict=True)
    ])  # fmt: skip


def thread_run(folder: Path, at: Floats, spent: Floats, threads: int) -> Path:
    """Write the run of a server whose `inference` runs in one of a few threads."""
    return _run(folder, at, [
        _in_thread(a, b, s)
        for a, b, s in zip(at, starts(at, spent, threads), spent, strict=True)
    ])  # fmt: skip


Served = tuple[dict[str, int], list[dict[str, Any]]]
"""Stages with their ns, and wait facts."""


def _fact(kind: str, start_ms: float, end_ms: float, loop: int = 0) -> dict[str, Any]:
    start, end = round(start_ms * MS), round(end_ms * MS)
    return {"kind": kind, "loop": loop, "start_ns": start, "end_ns": end}


def _on_loop(at: float, begun: float, spent: float, after_ms: float) -> Served:
    waited = begun - at  # Before the first line: the server takes the next request when it is free.
    stages = {"preprocess": round(spent * MS), "inference": round(after_ms * MS)}
    return {"": round(waited * MS)} | stages, [_fact("ran", 0, spent)]


def _in_thread(at: float, begun: float, spent: float) -> Served:
    waited = begun - at
    stages = {"queue.threadpool": round(waited * MS), "inference": round(spent * MS)}
    return stages, [_fact("thread", waited, waited + spent)]


def _run(folder: Path, at: Floats, served: list[Served]) -> Path:
    clients, servers = [], []
    for seq, (stages, facts) in enumerate(served):
        before = stages.pop("", 0)
        intended = BEGIN_NS + round(at[seq] * MS)
        last = intended + before + sum(stages.values())
        times = dict.fromkeys(("intended_ns", "started_ns", "connected_ns", "sent_ns"), intended)
        client = client_row(seq, **times, first_byte_ns=last, last_byte_ns=last)
        clients.append(client)
        row = server_row(client, stages, wait_facts=facts)
        servers.append(row | {"start_ns": intended + before})
    run = example_run(measured_s=float(at[-1]) / 1e3 + 0.001)
    plan = replace(run.plan, rate_per_s=None)  # No plan: arrivals for `rate=` are the run's own.
    return write_run_folder(folder, clients, servers, run=replace(run, plan=plan))
