"""A real model served without a network: `python benchmarks/gpu_threads.py > figures.json`.

Threads stand for clients; each request is marked as a server would mark it, and goes through the
example's network in batches. The agent, with all its samplers, runs on a thread of this process.
So it needs neither fastapi nor uvicorn. `--cpu` tries it where there is no GPU.
"""

from __future__ import annotations

import json
import queue
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import numpy as np
import torch

from stagescope.agent.loop import Agent
from stagescope.agent.samplers import chosen
from stagescope.examples.image_server.app import Image, top, warm_up
from stagescope.examples.image_server.settings import BatchLimits, Settings
from stagescope.examples.torch_server.model import Classifier
from stagescope.middleware.batch import Ticket, batch
from stagescope.middleware.exchange import begin
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.timeline import current
from stagescope.middleware.stage import stage
from stagescope.records import BatchRecord
from stagescope.testing.spool import Spool, short_spool

RUN: Final = "gpu-threads"
CLIENTS: Final = 24
LARGEST: Final = 8
FORMS_S: Final = 0.005
SIDE: Final = 224
WARM_S: Final = 3.0
"""In which the agent finds the process, and asks for the first device time."""
SERVED_S: Final = 10.0
LOOKED_EVERY_S: Final = 0.2

_SCOPE: Final[dict[str, Any]] = {
    "method": "POST", "path": "/predict",
    "headers": [(b"baggage", f"stagescope.run={RUN}".encode())],
}  # fmt: skip

Figures = dict[str, Any]


@dataclass(slots=True)
class Asked:
    """A request on its way through the model."""

    image: Image
    ticket: Ticket | None
    answer: Image = field(default_factory=lambda: np.empty(0))
    done: threading.Event = field(default_factory=threading.Event)


class Serving:
    """A batcher on a thread, and clients on theirs."""

    def __init__(self, recorder: Recorder, classifier: Classifier) -> None:
        self._recorder = recorder
        self._classifier = classifier
        self._waiting: queue.Queue[Asked | None] = queue.Queue()
        self._ends = threading.Event()
        self.faults: list[Exception] = []
        self._clients = [self._thread(self._ask) for _ in range(CLIENTS)]
        self._batcher = self._thread(self._serve)

    def _thread(self, target: Callable[[], None]) -> threading.Thread:
        def live() -> None:
            try:
                target()
            except Exception as fault:  # noqa: BLE001 - a thread has no caller: told at the end
                self.faults.append(fault)
                self._ends.set()

        return threading.Thread(target=live)

    def start(self) -> None:
        """Begin."""
        for thread in (self._batcher, *self._clients):
            thread.start()

    def stop(self) -> None:
        """End the clients, then the batcher."""
        self._ends.set()
        for client in self._clients:
            client.join(5)
        self._waiting.put(None)
        self._batcher.join(5)

    def _ask(self) -> None:
        noise = torch.randint(0, 256, (SIDE + 32, SIDE + 32, 3), dtype=torch.uint8)
        while not self._ends.is_set():
            timeline = begin(self._recorder, _SCOPE)
            token = current.set(timeline)
            with stage("preprocess"):
                image = noise[16 : 16 + SIDE, 16 : 16 + SIDE].permute(2, 0, 1).contiguous().numpy()
            asked = Asked(image, batch.enqueue())
            self._waiting.put(asked)
            while not asked.done.wait(1.0):
                if self._ends.is_set():
                    break
            else:
                with stage("postprocess"):
                    top(asked.answer)
            current.reset(token)
            timeline.finish(self._recorder.clock(), 0, 0, 0, 0, 0, 200, b"", b"")

    def _serve(self) -> None:
        while (first := self._waiting.get()) is not None:
            with batch(model="small-resnet") as formed:
                members = self._gathered(formed, first)
                with formed.collate():
                    images = self._classifier.collate([one.image for one in members])
                with formed.inference():
                    answers = self._classifier.infer(images)
            for one, answer in zip(members, answers, strict=True):
                one.answer = answer
                one.done.set()

    def _gathered(self, formed: batch, first: Asked) -> list[Asked]:
        members = [first]
        formed.add(first.ticket)
        last = time.monotonic() + FORMS_S
        while len(members) < LARGEST and (left_s := last - time.monotonic()) > 0:
            try:
                one = self._waiting.get(timeout=left_s)
            except queue.Empty:
                break
            if one is None:
                self._waiting.put(None)  # the end is `_serve`'s to see
                break
            members.append(one)
            formed.add(one.ticket)
        return members


@contextmanager
def _agent(spool: Path) -> Iterator[Agent]:
    """Run an agent on a thread, with all that it would have as a process."""
    agent = Agent(spool, {}, samplers=chosen())
    thread = threading.Thread(target=agent.run)
    thread.start()
    try:
        yield agent
    finally:
        agent.stop()
        thread.join()
        agent.close()


def threads(warm_s: float = WARM_S, served_s: float = SERVED_S) -> Figures:
    """Serve for a while; give what the agent saw of it."""
    size = Settings(width=40, image_side=SIDE, limits=BatchLimits(max_size=LARGEST))
    classifier = Classifier(size)
    warm_up(classifier, size)
    with short_spool() as folder:
        recorder = process_recorder(folder, "gpu-threads")
        if recorder is None or recorder.path is None:
            raise RuntimeError("no recorder file could be made")
        serving, spool = Serving(recorder, classifier), Spool(folder)
        with _agent(folder) as agent, closing(spool):
            serving.start()
            try:
                _look(spool, warm_s)
                since_ns = time.monotonic_ns()
                _look(spool, served_s)
                until_ns = time.monotonic_ns()
                captured = _capture(recorder.path)
                _look(spool, 1.0)
            finally:
                serving.stop()
            if serving.faults:
                raise serving.faults[0]
            return {
                "device": str(classifier.device),
                **_batches(spool, since_ns, until_ns),
                **_samples(agent, since_ns, until_ns),
                "agent": {name: round(cost["cpu_s"], 4) for name, cost in agent.costs().items()},
                "capture": captured,
            }


def _look(spool: Spool, for_s: float) -> None:
    """Read the recorder file before it comes round, for a while."""
    last = time.monotonic() + for_s
    while time.monotonic() < last:
        spool.records()
        time.sleep(LOOKED_EVERY_S)


def _batches(spool: Spool, since_ns: int, until_ns: int) -> Figures:
    found = [
        one
        for one in spool.records()
        if isinstance(one, BatchRecord) and since_ns <= one.start_ns < until_ns
    ]
    timed = [one.device_ns / 1e6 for one in found if one.device_ns]
    return {
        "batches": len(found),
        "requests": sum(len(one.members) for one in found),
        "coverage": len(timed) / len(found) if found else None,
        "batch_ms": median([one.duration_ns / 1e6 for one in found]) if found else None,
        "batch_device_ms": median(timed) if timed else None,
    }


def _samples(agent: Agent, since_ns: int, until_ns: int) -> Figures:
    """Return sums of what is counted by stage, and means of what the GPU was."""
    sums: dict[str, float] = defaultdict(float)
    levels: dict[str, list[float]] = defaultdict(list)
    for one in agent.evidence.samples.between(since_ns, until_ns):
        if one.name.startswith("model_server.stage."):
            sums[f"{one.name.rpartition('.')[2]} {one.detail}"] += one.value
        elif one.device:
            levels[f"{one.name} {one.detail}".strip()].append(one.value)
    return {
        "measured_s": (until_ns - since_ns) / 1e9,
        "stages": dict(sums),
        "gpu": {name: fmean(values) for name, values in levels.items()},
    }


def _capture(ring: Path) -> Figures:
    """Record a few batches, where this stagescope can."""
    if find_spec("stagescope.agent.kernels.capture") is None:
        return {"left_out": "this stagescope has no captures"}
    module: Any = import_module("gpu_capture")
    found: Figures = module._captured(ring, module.SMALL)
    return found


PARTS: Final[Mapping[str, Callable[[], object]]] = {"threads": threads}


def main(words: Sequence[str]) -> int:
    """Print the figures; say so where there is no GPU."""
    if "--cpu" not in words and not torch.cuda.is_available():
        print("gpu_threads: torch sees no CUDA device here, so there is nothing to measure",
              file=sys.stderr)  # fmt: skip
        return 1
    json.dump(threads(1.5, 3.0) if "--cpu" in words else threads(), sys.stdout, indent=2)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
