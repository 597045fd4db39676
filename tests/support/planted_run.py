"""A run folder with planted truth: what each stage used is known beforehand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.support.runs import (
    MS,
    amount_row,
    client_row,
    kernel_row,
    level_row,
    server_row,
    stack_row,
    write_run_folder,
)

REQUESTS = 120
BEGIN_NS = 1_000 * MS
"""When the first request was meant to be sent; they follow one another by 100 ms."""
SECONDS = 12
STAGES = {"queue": 10 * MS, "preprocess.parse": 30 * MS, "inference": 50 * MS}
APP = "/srv/app/server.py"
PACKAGE = "/srv/venv/lib/python3.11/site-packages/torch/nn/modules/linear.py"
GPU = "GPU-00000000-1111-2222-3333-444444444444"
KERNEL = "void gemm_bf16_128x128_32x3_tn_align8<cutlass::half_t, 128, 3>(float const*, float*)"


def planted_run(folder: Path, **changes: Any) -> Path:
    """Write a run of 120 requests in 12 s of one process, with samples, stacks and kernels.

    Process 1 used 6 s of CPU: of 100 running samples 50 are in `preprocess.parse`, 30 in
    `inference`, 20 in no stage. Device time: 4 s of `inference`. GPU busy: 0.8 while `inference`
    runs, 0.1 else, in windows of 10 ms. RSS grows from 100 to 122 MB.
    """
    clients = [client_row(seq, latency_ns=99 * MS) for seq in range(REQUESTS)]
    stall = {"stage": "inference", "cause": "gc", "stall_ns": 2 * MS}
    lag = {"stage": "queue", "cause": "loop", "stall_ns": 5 * MS}
    gaps = {"chunk_gaps": 4, "chunk_gap_sum_ns": 40 * MS, "chunk_gap_max_ns": 13 * MS}
    facts: dict[str, Any] = {"wait_facts": wait_facts(), **gaps}
    server = [server_row(row, STAGES, stalls=[stall, lag], **facts) for row in clients]
    evidence = {"samples": samples(), "stacks": stacks(), "kernels": kernels()} | changes
    return write_run_folder(folder, clients, server, **evidence)


def wait_facts() -> list[dict[str, Any]]:
    """Return what told waits apart: a collection of 2 ms, and 3 ms ready while nobody known ran."""
    times = {"ran": (0, 5), "gc": (10, 12), "ready": (20, 23)}
    return [
        {"kind": kind, "loop": 0, "start_ns": start * MS, "end_ns": end * MS}
        for kind, (start, end) in times.items()
    ]


def samples() -> list[dict[str, Any]]:
    """Return the readings of the run, and some of before and after it, and of another process."""
    found: list[dict[str, Any]] = []
    for second in range(-5, SECONDS + 5):
        start, end = BEGIN_NS + second * 1_000 * MS, BEGIN_NS + (second + 1) * 1_000 * MS
        found += [
            amount_row("process.cpu.time", 0.4, start, end, detail="user"),
            amount_row("process.cpu.time", 0.1, start, end, detail="system"),
            amount_row("process.cpu.time", 0.9, start, end, pid=77, detail="user"),
            level_row("process.memory.usage", 100e6 + 2e6 * second, start),
            level_row("hw.gpu.memory.usage", 20e9, start, pid=0, device=GPU),
            amount_row("stagescope.collector.cpu_time", 0.002, start, end, pid=0, detail="host"),
        ]
    for second in range(SECONDS):
        start, end = BEGIN_NS + second * 1_000 * MS, BEGIN_NS + (second + 1) * 1_000 * MS
        timed = {"device": GPU, "detail": "inference"}
        found += [
            amount_row("model_server.stage.device_time", 4 / SECONDS, start, end, **timed),
            amount_row("model_server.stage.device_opened", 10, start, end, **timed),
            amount_row("model_server.stage.device_timed", 9, start, end, **timed),
        ]
    return [*found, *_gpu_busy()]


def _gpu_busy() -> list[dict[str, Any]]:
    """Return windows of 10 ms; a request is in `inference` from 43 to 93 ms after its begin."""
    found = []
    for window in range(SECONDS * 100):
        start = BEGIN_NS + (window * 10 + 3) * MS
        busy = 0.8 if 4 <= window % 10 < 9 else 0.1
        found.append(
            level_row("hw.gpu.utilization", busy, start, start + 10 * MS, pid=0, device=GPU)
        )
    return found


def stacks() -> list[dict[str, Any]]:
    """Return the stacks: a hot function in `preprocess.parse`, a package's in `inference`."""
    loop = f"main ({APP}:1)"
    at = iter(range(BEGIN_NS, BEGIN_NS + SECONDS * 1_000 * MS, 100 * MS))
    hot = [loop, f"hot ({APP}:41)"]
    cold = [loop, f"cold ({APP}:50)"]
    model = [loop, f"predict ({APP}:60)", f"forward ({PACKAGE}:125)"]
    idle = [loop, "select (/usr/lib/python3.11/selectors.py:468)"]
    return [
        *(stack_row("preprocess.parse", next(at), *hot, samples=10) for _ in range(4)),
        stack_row("preprocess.parse", next(at), *cold, samples=10, by="block"),
        *(stack_row("inference", next(at), *model, samples=10) for _ in range(3)),
        *(stack_row("", next(at), *idle, samples=10) for _ in range(2)),
        stack_row("inference", next(at), *model, samples=20, running=False),
        stack_row("", next(at), *idle, samples=500, running=False),
        stack_row("queue", next(at), *hot, samples=300, reason="loop_lag"),
    ]


def kernels() -> list[dict[str, Any]]:
    """Return one capture of `inference`."""
    return [
        kernel_row(
            "inference", "stage", "", 8 * MS, span_ns=20 * MS, idle_ns=12 * MS, bound="launch"
        ),
        kernel_row("inference", "kernel", KERNEL, 6 * MS, launches=48),
        kernel_row("inference", "copy", "Memcpy HtoD (Pageable -> Device)", 2 * MS, launches=2),
        kernel_row("inference", "operator", "aten::linear", 30 * MS, launches=9, device="cpu"),
    ]
