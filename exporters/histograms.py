"""Histograms that take an observation in a fraction of a microsecond."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

DURATION_BOUNDS_S: Final = (
    0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.025, 0.05, 0.075, 0.1,
    0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 30.0, 60.0,
)  # fmt: skip
"""OpenTelemetry's boundaries for `http.server.request.duration`, carried on at both ends."""

DURATION_BOUNDS_NS: Final = tuple(round(bound * 1e9) for bound in DURATION_BOUNDS_S)
SIZE_BOUNDS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Seen(NamedTuple):
    """The newest observation of a bucket that has a trace to look at."""

    trace_id: str
    span_id: str
    value: int
    wall_ns: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A histogram at one moment: counts by bucket (the last is above all bounds), not summed up."""

    counts: tuple[int, ...]
    total: int
    exemplars: tuple[Seen | None, ...]


class Histogram:
    """Whole numbers counted by bucket; a bound belongs to the bucket below it."""

    __slots__ = ("bounds", "counts", "exemplars", "total")

    def __init__(self, bounds: Sequence[int] = DURATION_BOUNDS_NS) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.exemplars: list[Seen | None] = [None] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> int:
        """Count *value*; gives its bucket."""
        bucket = bisect_left(self.bounds, value)
        self.counts[bucket] += 1
        self.total += value
        return bucket

    def snapshot(self) -> Snapshot:
        """Copy what is counted so far."""
        return Snapshot(tuple(self.counts), self.total, tuple(self.exemplars))
