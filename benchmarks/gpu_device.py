"""Device times and torch memory on a real GPU: `python benchmarks/gpu_device.py > figures.json`.

Each function measures one thing and gives plain figures; `gpu_check.py` calls them too. Without a
GPU it ends with one sentence. Costs are medians in µs of host time in the thread of the server.
"""

from __future__ import annotations

import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any, Final

from stagescope.middleware.batch import batch
from stagescope.middleware.runtime.observers import leave, observe
from stagescope.middleware.stage import stage
from stagescope.middleware.torch.device_events import TorchClock
from stagescope.middleware.torch.device_time import DeviceTime
from stagescope.middleware.torch.memory import device_memory, pinned_memory, state
from stagescope.middleware.torch.snapshot import watch_memory, write_snapshot
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording

IN_FLIGHT = (1, 2, 4, 8, 16, 32, 64)
ROUNDS = 50
BATCHES = 200
WIDTH, LAYERS, ROWS = 2048, 8, 256
SLEEP_CYCLES = 20_000_000
"""About ten milliseconds of a GPU that does nothing: so that what is put behind it waits."""

Figures = dict[str, Any]


def _torch() -> Any:
    """Return torch, as late as it is needed, and without its half of types."""
    import torch

    return torch


@contextmanager
def timed() -> Iterator[tuple[DeviceTime, Recording]]:
    """Take device times of inference inside the block."""
    torch = _torch()
    with tempfile.TemporaryDirectory() as folder:
        recording = Recording(Path(folder), ring_slots=4096)
        times = DeviceTime(TorchClock("cuda", torch.cuda), ["inference"])
        observe(times)
        try:
            yield times, recording
        finally:
            leave(times)
            recording.close()


def why_not() -> str:
    """Return why nothing can be measured here; empty where it can."""
    try:
        import torch
    except ImportError:
        return "there is no torch here, so there are no device times to measure"
    if not torch.cuda.is_available():
        return "torch sees no GPU here, so there are no device times to measure"
    return ""


def asking_begins_nothing() -> Figures:
    """Return whether CUDA is in use before and after it was asked for; call this first."""
    torch = _torch()
    before = torch.cuda.is_initialized()
    told = state(torch)
    return {"before": before, "state": told, "after": torch.cuda.is_initialized()}


def _model() -> tuple[Any, Any]:
    torch = _torch()
    layers = [torch.nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)]
    model = torch.nn.Sequential(*layers).to("cuda", torch.float16).eval()
    rows = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        for _ in range(10):
            model(rows)
    torch.cuda.synchronize()
    return model, rows


def event_cost() -> list[Figures]:
    """Return what a stage costs the thread with so many in flight that the device has not begun.

    `unwatched_us`: without us. `put_us`: the marks are put, and the oldest one asked in vain.
    `settled_us`: the device is done, so that eight marks are taken in with each that is put.
    """
    torch = _torch()
    lines = []
    with timed() as (times, recording):
        for in_flight in IN_FLIGHT:
            found: dict[str, list[float]] = {"unwatched_us": [], "put_us": [], "settled_us": []}
            for turn in range(ROUNDS + 1):
                leave(times)
                unwatched = _stage_us(recording, in_flight)
                observe(times)
                torch.cuda._sleep(SLEEP_CYCLES)
                put = _stage_us(recording, in_flight)
                torch.cuda.synchronize()
                settled = _stage_us(recording, max(1, in_flight // 8))
                _stage_us(recording, in_flight)
                if turn:  # the first makes the events
                    for what, us in zip(found, (unwatched, put, settled), strict=True):
                        found[what].append(us)
            medians = {what: median(us) for what, us in found.items()}
            lines.append({"in_flight": in_flight, **medians})
    return lines


def _stage_us(recording: Recording, count: int) -> float:
    """Open and close *count* stages, each in its own request; give µs each."""
    spent_ns = 0
    for _ in range(count):
        with recording.request():
            begun = time.perf_counter_ns()
            with stage("inference"):
                pass
            spent_ns += time.perf_counter_ns() - begun
    return spent_ns / 1e3 / count


def against_reference(*, graph: bool, pipelined: bool) -> Figures:
    """Compare the device time of stages with events around each and a clock that waits.

    *pipelined*: up to a whole round of batches in flight, compared with one pair of events around
    all of them; else each batch is waited for, so that both references stand for each.
    """
    torch = _torch()
    model, rows = _model()
    call = _graphed(model, rows) if graph else _eager(model, rows)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    wall_ns, pairs_ms = 0, 0.0
    with timed() as (times, recording):
        torch.cuda.synchronize()
        first.record()
        for _ in range(BATCHES):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begun = time.perf_counter_ns()
            if not pipelined:
                begin.record()
            with recording.request(), stage("inference"):
                call()
            if not pipelined:
                end.record()
                torch.cuda.synchronize()
                wall_ns += time.perf_counter_ns() - begun
                pairs_ms += begin.elapsed_time(end)
        last.record()
        torch.cuda.synchronize()
        for _ in range(BATCHES):  # asks for what is left, and adds next to nothing
            with recording.request(), stage("inference"):
                pass
        sums = times.sums()
    (found,) = sums["stages"]
    return {
        "graph": graph,
        "pipelined": pipelined,
        "batches": BATCHES,
        "stage_ms": found["ns"] / 1e6,
        "event_pairs_ms": pairs_ms,
        "synchronised_wall_ms": wall_ns / 1e6,
        "first_to_last_ms": first.elapsed_time(last),
        "opened": found["opened"],
        "timed": found["timed"],
        "missed": sums["missed"],
        "pending": sums["pending"],
        "failure": sums["failure"],
    }


def _eager(model: Any, rows: Any) -> Callable[[], object]:
    torch = _torch()

    def call() -> object:
        with torch.inference_mode():
            return model(rows)

    return call


def _graphed(model: Any, rows: Any) -> Callable[[], object]:
    torch = _torch()
    graph = torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.graph(graph):
        model(rows)

    def call() -> object:
        graph.replay()
        return None

    return call


def capture_beside_stages() -> Figures:
    """Capture graphs in one thread while another opens and closes timed stages.

    In CUDA's default mode a single event that is asked in the other thread would spoil them.
    """
    torch = _torch()
    model, rows = _model()
    stop, failures, captured = threading.Event(), [], 0
    with timed() as (times, recording):

        def serve() -> None:
            stream = torch.cuda.Stream()
            with torch.cuda.stream(stream):
                while not stop.is_set():
                    with recording.request(), stage("inference"):
                        pass

        thread = threading.Thread(target=serve)
        thread.start()
        for _ in range(20):
            try:
                with recording.request(), stage("inference"):
                    _graphed(model, rows)()
                captured += 1
            except RuntimeError as error:
                failures.append(str(error).partition("\n")[0])
        stop.set()
        thread.join()
        torch.cuda.synchronize()
        sums = times.sums()
    return {"captured": captured, "failures": failures, "missed": sums["missed"],
            "stage_failure": sums["failure"]}  # fmt: skip


def batches_with_device_time() -> Figures:
    """Return the share of batches whose record has its device time, where the result is fetched."""
    torch = _torch()
    model, rows = _model()
    with timed() as (_, recording):
        for _ in range(BATCHES):
            with recording.request():
                ticket = batch.enqueue()
                with batch() as formed:
                    formed.add(ticket)
                    with formed.inference(), torch.inference_mode():
                        model(rows).cpu()
        records = recording.batches
    return {"batches": len(records), "with_device_time": sum(1 for one in records if one.device_ns)}


def throughput() -> Figures:
    """Return batches a second, watched and not, in turns; each batch is waited for."""
    torch = _torch()
    model, rows = _model()
    call = _eager(model, rows)
    rates: dict[str, list[float]] = {"watched": [], "unwatched": []}
    with tempfile.TemporaryDirectory() as folder:
        recording = Recording(Path(folder))
        times = DeviceTime(TorchClock("cuda", torch.cuda), ["inference"])
        for _ in range(10):
            for what, found in rates.items():
                if what == "watched":
                    observe(times)
                begun = time.perf_counter()
                for _ in range(BATCHES):
                    with recording.request(), stage("inference"):
                        call()
                    torch.cuda.current_stream().synchronize()
                found.append(BATCHES / (time.perf_counter() - begun))
                leave(times)
        recording.close()
    return {what: median(found) for what, found in rates.items()}


def memory_cost() -> Figures:
    """Return µs to read the allocators, and what a snapshot takes."""
    torch = _torch()
    _model()
    namespace = torch.cuda
    pinned = torch.empty(1 << 20).pin_memory()
    reads: dict[str, Callable[[], object]] = {"device": lambda: device_memory("cuda", namespace),
             "pinned": lambda: pinned_memory(namespace)}  # fmt: skip
    found: Figures = {}
    for what, read in reads.items():
        spent = []
        for _ in range(ROUNDS):
            begun = time.perf_counter_ns()
            read()
            spent.append((time.perf_counter_ns() - begun) / 1e3)
        found[f"{what}_us"] = median(spent)
    found["device"], found["pinned"] = device_memory("cuda", namespace), pinned_memory(namespace)
    del pinned
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter_ns()
        path, left_out = write_snapshot(torch.cuda.memory._snapshot(), Path(folder), 1)
        found["snapshot_ms"] = (time.perf_counter_ns() - begun) / 1e6
        found["snapshot_bytes"], found["snapshot_left_out"] = path.stat().st_size, left_out
    return found


def out_of_memory() -> Figures:
    """Run out of device memory on purpose; give the notice that is left and the snapshot's size."""
    torch = _torch()
    with tempfile.TemporaryDirectory() as folder:
        recording = Recording(Path(folder))
        torch.zeros(1, device="cuda")
        watch_memory(torch, "cuda", torch.cuda, recording.recorder)
        with suppress(torch.cuda.OutOfMemoryError):
            torch.empty(1 << 50, dtype=torch.uint8, device="cuda")
        (notice,) = wait_until(lambda: list((Path(folder) / "notices").glob("*.json")))
        told: Figures = json.loads(notice.read_text())
        told["snapshot_bytes"] = Path(told["path"]).stat().st_size if told["path"] else 0
        recording.close()
    return told


def against_references() -> list[Figures]:
    """Compare eager calls and graphs, each waited for and not."""
    return [
        against_reference(graph=graph, pipelined=pipelined)
        for graph in (False, True)
        for pipelined in (False, True)
    ]


PARTS: Final[Mapping[str, Callable[[], object]]] = {
    "asking_begins_nothing": asking_begins_nothing,
    "event_cost": event_cost,
    "against_reference": against_references,
    "capture_beside_stages": capture_beside_stages,
    "batches_with_device_time": batches_with_device_time,
    "throughput": throughput,
    "memory_cost": memory_cost,
    "out_of_memory": out_of_memory,
}
"""In the order in which they can be measured."""


def measure() -> Figures:
    """Measure all."""
    return {name: part() for name, part in PARTS.items()}


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    json.dump(measure(), sys.stdout, indent=2)
