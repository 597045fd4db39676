"""Turns counters that only grow into samples of how much they grew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from stagescope.samples import Sample


@dataclass(frozen=True, slots=True)
class Counter:
    """What one counter is called, and in what it counts."""

    name: str
    """One of `SAMPLE_NAMES`, of kind AMOUNT."""
    detail: str = ""
    unit: float = 1.0
    """What one count is worth in the name's unit: 1e-6 for a counter of µs."""


class Growth:
    """The last reading of the counters of one thing: a process, a cgroup, the host."""

    def __init__(self, pid: int = 0) -> None:
        self._pid = pid
        self._last: dict[Counter, tuple[int, int]] = {}

    def since(self, now_ns: int, counters: Mapping[Counter, int]) -> Iterator[Sample]:
        """Read *counters* at *now_ns*; give how much each grew since it was last read.

        One that is read for the first time gives nothing, nor does one that fell: it began anew.
        """
        for counter, value in counters.items():
            before = self._last.get(counter)
            self._last[counter] = now_ns, value
            if before is not None and before[1] <= value and before[0] < now_ns:
                amount = (value - before[1]) * counter.unit
                yield Sample(
                    counter.name, before[0], now_ns, amount, self._pid, detail=counter.detail
                )


def level(name: str, now_ns: int, value: float, pid: int = 0, detail: str = "") -> Sample:
    """Give how high something stood at *now_ns*."""
    return Sample(name, now_ns, now_ns, value, pid, detail=detail)
