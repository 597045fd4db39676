"""What samplers put in and load runs, metrics and people take out: samples, stacks, kernels."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from stagescope.agent.gpu.probe import Device
from stagescope.agent.store.samples import SampleStore
from stagescope.kernels import KernelRow
from stagescope.stacks import StackSpan

T = TypeVar("T", StackSpan, KernelRow)


class BoundedLog(Generic[T]):
    """The newest *most* of what was added; any thread adds, any thread asks."""

    def __init__(self, most: int) -> None:
        self._kept: deque[T] = deque(maxlen=most)
        self._added = self._evicted = 0
        self._lock = threading.Lock()

    def add(self, new: Sequence[T]) -> None:
        """Keep *new* too."""
        with self._lock:
            room = (self._kept.maxlen or 0) - len(self._kept)
            self._evicted += max(0, len(new) - room)
            self._added += len(new)
            self._kept.extend(new)

    def forget_before(self, time_ns: int) -> None:
        """Drop what ended before *time_ns*."""
        with self._lock:
            while self._kept and self._kept[0].end_ns < time_ns:
                self._kept.popleft()
                self._evicted += 1

    def between(self, since_ns: int, until_ns: int) -> list[T]:
        """Return what overlaps the time from *since_ns* to *until_ns*."""
        with self._lock:
            kept = list(self._kept)
        return [one for one in kept if one.end_ns >= since_ns and one.start_ns <= until_ns]

    def counters(self) -> dict[str, float]:
        """Return how many were added, and evicted to keep within bounds."""
        with self._lock:
            return {"added": self._added, "evicted": self._evicted}


MAX_STACKS = 50_000
"""About 1 kB each."""
MAX_KERNELS = 20_000


@dataclass(frozen=True, slots=True)
class TelemetryBuffer:
    """One agent's samples, stacks and kernels of the last half hour or so."""

    samples: SampleStore = field(default_factory=SampleStore)
    stacks: BoundedLog[StackSpan] = field(default_factory=lambda: BoundedLog[StackSpan](MAX_STACKS))
    kernels: BoundedLog[KernelRow] = field(
        default_factory=lambda: BoundedLog[KernelRow](MAX_KERNELS)
    )
    devices: dict[str, Device] = field(default_factory=dict[str, Device])
    """What `Sample.device` names, by it; a device that was removed stays, for its samples do."""
    before_reading: list[Callable[[float], None]] = field(default_factory=list[Any])
    """What to call, with seconds to wait at most, before a run's evidence is read: whoever
    samples in windows ends them and puts in what they saw."""
    counts: Counter[str] = field(default_factory=Counter[str])

    def settle(self, timeout_s: float = 2.0) -> None:
        """Wait until what was sampled up to now is here; not from the agent's loop."""
        for finish in self.before_reading:
            finish(timeout_s)

    def forget_before(self, time_ns: int) -> None:
        """Drop what ended before *time_ns*, so that memory stops growing."""
        self.samples.forget_before(time_ns)
        self.stacks.forget_before(time_ns)
        self.kernels.forget_before(time_ns)

    def count(self, name: str, more: int = 1) -> None:
        """Count something that a sampler did or failed to do."""
        self.counts[name] += more

    def counters(self) -> dict[str, float]:
        """Return what was added and evicted, by kind."""
        return {
            **self.samples.counters(),
            **self.counts,
            **{f"stacks_{name}": value for name, value in self.stacks.counters().items()},
            **{f"kernels_{name}": value for name, value in self.kernels.counters().items()},
        }
