"""Collectors: what the agent's loop does now and then, and what each of them costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Final, Protocol, runtime_checkable

COUNTERS_OF: Final = "collector_"
"""What the names of a collector's counters begin with."""


class Collector(Protocol):
    """Something that the loop does now and then; samplers are collectors."""

    @property
    def name(self) -> str:
        """A word for it, as its own cost is shown under: `host`, `gpu`, `stacks`."""
        ...

    @property
    def period_s(self) -> float:
        """Seconds from one call to the next; asked each time, so it may change."""
        ...

    def collect(self) -> None:
        """Do it, in the loop's thread: a few milliseconds at most, what lasts is begun and polled."""

    def close(self) -> None:
        """End whatever it has begun: processes, threads, files."""


@runtime_checkable
class HasChildCpu(Protocol):
    """A collector that has others work for it, whose CPU time its own thread's does not show."""

    def children_cpu_s(self) -> float:
        """Return the CPU seconds of all processes and threads that it ever began; only grows."""
        ...


@dataclass(frozen=True, slots=True)
class Cost:
    """What a collector has cost so far."""

    cpu_s: float = 0.0
    """Its children's included (`HasChildCpu`)."""
    late_s: float = 0.0
    stall_s: float = 0.0
    """For how long it held up the loop."""

    def __sub__(self, earlier: Cost) -> Cost:
        return Cost(
            self.cpu_s - earlier.cpu_s,
            self.late_s - earlier.late_s,
            self.stall_s - earlier.stall_s,
        )


@dataclass(frozen=True, slots=True)
class PeriodicTask:
    """A collector made of a function."""

    name: str
    period_s: float
    do: Callable[[], None]

    def collect(self) -> None:
        """Do it."""
        self.do()

    def close(self) -> None:
        """Nothing was begun."""


class Metered:
    """A collector, when it is due, and its own cost."""

    def __init__(self, collector: Collector, clock: Callable[[], int]) -> None:
        self.name = collector.name
        self.close = collector.close
        self.due_ns = 0
        self._collector = collector
        self._clock = clock
        self._children_cpu_s = (
            collector.children_cpu_s if isinstance(collector, HasChildCpu) else lambda: 0.0
        )
        self._calls = self._cpu_ns = self._late_ns = self._stall_ns = self._longest_ns = 0

    def collect(self, now_ns: int) -> None:
        """Call it; *now_ns* is when the loop found it due."""
        if self.due_ns:
            self._late_ns += now_ns - self.due_ns
        self.due_ns = now_ns + int(self._collector.period_s * 1e9)
        begun_ns = self._clock()
        used_ns = time.thread_time_ns()
        try:
            self._collector.collect()
        finally:
            self._calls += 1
            self._cpu_ns += time.thread_time_ns() - used_ns
            took_ns = self._clock() - begun_ns
            self._stall_ns += took_ns
            self._longest_ns = max(self._longest_ns, took_ns)

    def cost(self) -> Cost:
        """Return what it has cost so far."""
        cpu_s = self._cpu_ns / 1e9 + self._children_cpu_s()
        return Cost(cpu_s, self._late_ns / 1e9, self._stall_ns / 1e9)

    def figures(self) -> dict[str, float]:
        """Return calls; seconds of CPU, late, and held up in all; the longest that one call took."""
        return {
            "calls": self._calls,
            **asdict(self.cost()),
            "longest_s": self._longest_ns / 1e9,
        }

    def counters(self) -> dict[str, float]:
        """Return the same by names that say whose they are."""
        return {f"{COUNTERS_OF}{self.name}_{key}": n for key, n in self.figures().items()}

    @property
    def thread_cpu_s(self) -> float:
        """CPU seconds that the loop's thread spent in it."""
        return self._cpu_ns / 1e9
