"""The samples of the last hour or so, in bounded memory, for load runs and metrics."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from stagescope.samples import Sample

MAX_SAMPLES = 1_000_000
"""24 bytes each: an hour of about 300 readings a second."""

Key = tuple[str, int, str, str]
"""Name, pid, device, detail: what makes one series."""


@dataclass(slots=True)
class _Series:
    starts: array[int] = field(default_factory=lambda: array("q"))
    ends: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))
    total: float = 0.0
    """Sum of all values ever added; what a counter shows."""

    def drop(self, count: int) -> None:
        del self.starts[:count], self.ends[:count], self.values[:count]


class SampleStore:
    """Keeps samples by series; any thread adds, any thread asks."""

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        self._max = max_samples
        self._series: dict[Key, _Series] = {}
        self._held = self._added = self._evicted = 0
        self._lock = threading.Lock()

    def add(self, samples: Sequence[Sample]) -> None:
        """Add *samples*; of one series they come in the order of their times."""
        with self._lock:
            for sample in samples:
                key = sample.name, sample.pid, sample.device, sample.detail
                series = self._series.get(key)
                if series is None:
                    series = self._series[key] = _Series()
                series.starts.append(sample.start_ns)
                series.ends.append(sample.end_ns)
                series.values.append(sample.value)
                series.total += sample.value
            self._added += len(samples)
            self._held += len(samples)
            if self._held > self._max:
                self._evict()

    def _evict(self) -> None:
        """Drop the older half of every series; series that get no more samples vanish in the end."""
        for key, series in list(self._series.items()):
            count = (len(series.starts) + 1) // 2
            series.drop(count)
            self._held -= count
            self._evicted += count
            if not series.starts:
                del self._series[key]

    def between(self, since_ns: int, until_ns: int) -> Iterator[Sample]:
        """Yield the samples that overlap the time from *since_ns* to *until_ns*."""
        with self._lock:  # only to copy: an hour of samples would hold up who adds
            copies = [
                (key, series.starts[:], series.ends[:], series.values[:])
                for key, series in self._series.items()
                if series.ends and series.ends[-1] >= since_ns and series.starts[0] <= until_ns
            ]
        for (name, pid, device, detail), starts, ends, values in copies:
            for start, end, value in zip(starts, ends, values, strict=True):
                if end >= since_ns and start <= until_ns:
                    yield Sample(name, start, end, value, pid, device, detail)

    def latest(self, not_before_ns: int) -> list[tuple[Sample, float]]:
        """Return the newest sample of each series that ended since, and the series' total."""
        with self._lock:
            return [
                (Sample(name, s.starts[-1], s.ends[-1], s.values[-1], pid, device, detail), s.total)
                for (name, pid, device, detail), s in self._series.items()
                if s.ends and s.ends[-1] >= not_before_ns
            ]

    def counters(self) -> dict[str, float]:
        """Return samples added, and evicted to keep within bounds."""
        with self._lock:
            return {"samples": self._added, "samples_evicted": self._evicted}

    def gauges(self) -> dict[str, float]:
        """Return what is held."""
        with self._lock:
            return {"samples_held": self._held, "sample_series": len(self._series)}
