"""What taking device times costs a thread of the server: `python benchmarks/device_cost.py`.

On events that cost nothing, so this is our own part; what the events of a real device cost is
measured by `benchmarks/gpu_device.py`. Both ways run in one process, interleaved.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.runtime.observers import StageObserver, leave, observe
from stagescope.middleware.stage import stage
from stagescope.middleware.torch.device_time import DeviceTime
from stagescope.testing.recording import Recording

ROUNDS = 200
STAGES = 24
"""In one request: a timeline's first slot has 32 entries."""


class FreeStream:
    """A stream that does nothing."""


class FreeEvent:
    """An event that is come to at once and costs a call."""

    def record(self, stream: object) -> None:
        """Do nothing."""

    def query(self) -> bool:
        """Be there."""
        return True

    def elapsed_time(self, later: object) -> float:
        """Return a millisecond."""
        return 1.0


class FreeClock:
    """A device that costs a call each time."""

    def __init__(self) -> None:
        self._stream = FreeStream()

    def capturing(self) -> bool:
        """Capture nothing."""
        return False

    def on_capture(self, quiet: Callable[[], None]) -> None:
        """Never call it."""

    def stream(self) -> FreeStream:
        """Return the one stream."""
        return self._stream

    def key(self, stream: object) -> tuple[int, int]:
        """Name it."""
        return 0, 0

    def event(self) -> FreeEvent:
        """Make an event."""
        return FreeEvent()

    def device(self, stream: object) -> str:
        """Name the device."""
        return "GPU-0"


class Idle:
    """An observer that does nothing: what being told costs."""

    def opened(self, timeline: Timeline, index: int, code: int) -> None:
        """Do nothing."""

    def closed(self, timeline: Timeline, index: int, code: int) -> None:
        """Do nothing."""


@contextmanager
def observed(observer: StageObserver | None) -> Iterator[None]:
    """Let *observer* watch inside the block."""
    if observer is not None:
        observe(observer)
    yield
    if observer is not None:
        leave(observer)


def once(recording: Recording, name: str) -> float:
    """Return µs a stage of *name*."""
    with recording.request():
        begun = time.perf_counter_ns()
        for _ in range(STAGES):
            with stage(name):
                pass
        return (time.perf_counter_ns() - begun) / 1e3 / STAGES


def measure(spool: Path) -> dict[str, float]:
    """Return the median µs a stage, by who watches."""
    recording = Recording(spool)
    times = DeviceTime(FreeClock(), ["inference"])
    watched: dict[str, tuple[StageObserver | None, str]] = {
        "nobody watches": (None, "inference"),
        "an observer that does nothing": (Idle(), "inference"),
        "device times, another stage": (times, "preprocess"),
        "device times, this stage": (times, "inference"),
    }
    found: dict[str, list[float]] = {what: [] for what in watched}
    for _ in range(ROUNDS):
        for what, (observer, name) in watched.items():
            with observed(observer):
                found[what].append(once(recording, name))
    recording.close()
    return {what: median(values) for what, values in found.items()}


def report(tell: Callable[[str], None]) -> None:
    """Measure and print a line each."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    base = found["nobody watches"]
    for what, value in found.items():
        tell(f"{what:32} {value:6.2f} µs a stage, {value - base:+.2f}")


if __name__ == "__main__":
    report(print)
