"""Collectors: what the agent's loop does now and then, and what each of them costs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


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


@dataclass(frozen=True, slots=True)
class Chore:
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
        self._calls = self._cpu_ns = self._late_ns = self._longest_ns = 0

    def collect(self, now_ns: int) -> None:
        """Call it; *now_ns* is when the loop found it due."""
        if self.due_ns:
            self._late_ns += now_ns - self.due_ns
        self.due_ns = now_ns + int(self._collector.period_s * 1e9)
        used_ns = time.thread_time_ns()
        try:
            self._collector.collect()
        finally:
            self._calls += 1
            self._cpu_ns += time.thread_time_ns() - used_ns
            self._longest_ns = max(self._longest_ns, self._clock() - now_ns)

    def counters(self) -> dict[str, float]:
        """Give calls, CPU seconds, seconds late in all, and the longest that one call took."""
        return {
            f"collector_{self.name}_calls": self._calls,
            f"collector_{self.name}_cpu_s": self._cpu_ns / 1e9,
            f"collector_{self.name}_late_s": self._late_ns / 1e9,
            f"collector_{self.name}_longest_s": self._longest_ns / 1e9,
        }

    @property
    def thread_cpu_s(self) -> float:
        """CPU seconds that the loop's thread spent in it."""
        return self._cpu_ns / 1e9
