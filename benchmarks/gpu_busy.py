"""A process that keeps a device busy, for gpu_nvml.py: small batches, and how long each took.

`python gpu_busy.py DEVICE OUT` prints `ready`, then makes batches until its standard input ends.
A line `capture` there has it record the next few batches with torch's profiler. At the end OUT
holds JSON: `batches` (begin and length, monotonic ns) and `captures`.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from stagescope.testing import wait_until

LAYERS: Final = 24
SIZES: Final = {"cuda": (1024, 32), "cpu": (64, 4)}
"""Width and rows: about a millisecond a batch, most of it launches, which a lock would hold up."""
RECORDED: Final = 20
"""Batches of one capture."""
START_S: Final = 60.0
END_S: Final = 30.0


class Busy:
    """Such a process, seen from the one that started it."""

    def __init__(self, process: subprocess.Popen[str], out: Path) -> None:
        self._process = process
        self._out = out

    def capture(self) -> None:
        """Have it record its next batches."""
        assert self._process.stdin is not None
        self._process.stdin.write("capture\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """End it; give what it noted."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(END_S)
        told: dict[str, Any] = json.loads(self._out.read_text())
        return told


@contextmanager
def busy(device: str) -> Iterator[Busy]:
    """Start one and wait until it makes batches; it ends with the block."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "batches.json"
        with subprocess.Popen(
            [sys.executable, __file__, device, str(out)], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        ) as process:  # fmt: skip
            said: list[str] = []
            assert process.stdout is not None
            reader = threading.Thread(target=lambda out: said.append(out.readline()),
                                      args=(process.stdout,))  # fmt: skip
            reader.start()
            try:
                wait_until(lambda: said, START_S)
                if said != ["ready\n"]:
                    raise RuntimeError("the process that keeps the device busy did not start")
                yield Busy(process, out)
            finally:
                process.kill()
                reader.join()


def _work(device: str) -> dict[str, Any]:
    call = _call(device)
    for _ in range(50):
        call()
    ends = threading.Event()
    asked: queue.SimpleQueue[None] = queue.SimpleQueue()  # Each question gets its capture.
    threading.Thread(target=_listen, args=(ends, asked), daemon=True).start()
    batches: list[tuple[int, int]] = []
    captures: list[dict[str, Any]] = []
    print("ready", flush=True)
    while not ends.is_set() or not asked.empty():
        begun = time.monotonic_ns()
        call()
        batches.append((begun, time.monotonic_ns() - begun))
        if not asked.empty():
            asked.get()
            captures.append(_captured(device, call))
    return {"batches": batches, "captures": captures}


def _listen(ends: threading.Event, asked: queue.SimpleQueue[None]) -> None:
    for _ in sys.stdin:
        asked.put(None)
    ends.set()


def _call(device: str) -> Callable[[], object]:
    import torch

    torch.set_num_threads(1)
    width, rows = SIZES[device]
    layers: list[torch.nn.Module] = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(width, width), torch.nn.ReLU()]
    model = torch.nn.Sequential(*layers).to(device).eval()
    host = torch.randn(rows, width)

    def call() -> object:
        with torch.inference_mode():
            return model(host.to(device)).cpu()

    return call


def _captured(device: str, call: Callable[[], object]) -> dict[str, Any]:
    """Record some batches; give how many kernels (on a CPU: operators) were seen."""
    from torch.profiler import ProfilerActivity, profile

    begun = time.monotonic_ns()
    activity = ProfilerActivity.CPU if device == "cpu" else ProfilerActivity.CUDA
    try:
        with profile(activities=[activity]) as profiler:
            for _ in range(RECORDED):
                call()
            stopping = time.monotonic_ns()
        stopped = time.monotonic_ns()
        kernels, failed = _kernels(device, profiler), ""
    except RuntimeError as error:
        stopping = stopped = time.monotonic_ns()
        kernels, failed = 0, str(error).partition("\n")[0]
    return {
        "begun_ns": begun,
        "ended_ns": time.monotonic_ns(),
        "stop_s": (stopped - stopping) / 1e9,
        "batches": RECORDED,
        "kernels": kernels,
        "failed": failed,
    }


def _kernels(device: str, profiler: Any) -> int:
    """Count kernels, without copies and without the calls that launched them."""
    events = profiler.events() or ()
    if device == "cpu":
        return len(events)
    return sum(
        one.device_type.name == "CUDA" and not one.name.startswith(("Memcpy", "Memset"))
        for one in events
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(_work(sys.argv[1])))
