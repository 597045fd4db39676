"""A process that serves batches on a CUDA device, for `gpu_capture.py`: no network, real stages.

`python gpu_capture_served.py SPOOL MODE` serves until its standard input ends, then prints one JSON
object: for each batch when it began (monotonic ns), how long it took, and its time on the device.
MODE: `eager`; `graphs` (one CUDA graph, replayed); `prewarmed` (the same, with an empty profile
before the graph is captured); `cpu` (eager, on no device: to try the script).
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from stagescope.middleware.probe.server import Probe
from stagescope.middleware.stage import stage
from stagescope.testing.recording import Recording

LAYERS, WIDTH, BATCH = 24, 1024, 32


def served(spool: Path, mode: str) -> dict[str, Any]:
    """Serve until standard input ends; give what each batch took."""
    device = "cpu" if mode == "cpu" else "cuda"
    model = _model(device)
    if mode == "prewarmed":
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]):
            pass
    call = _replayed(model) if mode in ("graphs", "prewarmed") else _eager(model, device)
    host = torch.randn(BATCH, WIDTH)
    if device == "cuda":
        host = host.pin_memory()
    recording = Recording(spool, ring_slots=8192)
    probe = Probe(recording.path.with_suffix(".probe"), recording.recorder)
    batches: list[tuple[int, int, float]] = []
    ends = threading.Event()
    threading.Thread(target=_wait_for_the_end, args=(ends,), daemon=True).start()
    timer = Timer() if device == "cuda" else NoTimer()
    while not ends.is_set():
        with recording.request() as timeline:
            with stage("preprocess"):
                given = host.to(device, non_blocking=True)
            with stage("inference"):
                timer.begin()
                result = call(given)
                timer.end()
                result.cpu()
        took_ns = recording.recorder.clock() - timeline.start_ns
        batches.append((timeline.start_ns, took_ns, timer.ms()))
    probe.stop()
    recording.close()
    return {"batches": batches}


def _wait_for_the_end(ends: threading.Event) -> None:
    sys.stdin.read()
    ends.set()


class NoTimer:
    """No device, no time on it."""

    def begin(self) -> None:
        """Nothing."""

    def end(self) -> None:
        """Nothing."""

    def ms(self) -> float:
        """Nothing."""
        return 0.0


class Timer(NoTimer):
    """A pair of events around the model; asked when the result has come, so nothing waits."""

    def __init__(self) -> None:
        self._pair: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Mark the beginning."""
        self._pair[0].record()

    def end(self) -> None:
        """Mark the end."""
        self._pair[1].record()

    def ms(self) -> float:
        """Return the time between."""
        return float(self._pair[0].elapsed_time(self._pair[1]))


def _model(device: str) -> torch.nn.Module:
    layers: list[torch.nn.Module] = []
    for _ in range(LAYERS):
        layers += [torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU()]
    return torch.nn.Sequential(*layers).to(device).eval()


def _eager(model: torch.nn.Module, device: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(given: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return torch.as_tensor(model(given))

    call(torch.zeros(BATCH, WIDTH, device=device))
    return call


def _replayed(model: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    static = torch.zeros(BATCH, WIDTH, device="cuda")
    side: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    with torch.no_grad(), torch.cuda.stream(side):
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), torch.cuda.graph(graph):
        result = model(static)

    def call(given: torch.Tensor) -> torch.Tensor:
        static.copy_(given)
        graph.replay()
        return torch.as_tensor(result)

    return call


if __name__ == "__main__":
    print(json.dumps(served(Path(sys.argv[1]), sys.argv[2])))
