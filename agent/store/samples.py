"""The newest samples, in bounded memory, for load runs and metrics."""

from __future__ import annotations

import threading
import zlib
from array import array
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stagescope.samples import Sample

MAX_SAMPLES = 1_000_000
"""About 10 bytes each: an hour of about 300 readings a second."""
BLOCK_SAMPLES = 4096
"""So many are compressed together: a minute of one server's, one or two milliseconds of work."""

Key = tuple[str, int, str, str]
"""Name, pid, device, detail: what makes one series."""


@dataclass(slots=True)
class _Series:
    number: int
    newest: Sample
    total: float = 0.0
    """Sum of all values ever added; what a counter shows."""
    held: int = 0
    """Its samples that are kept; one that has none is forgotten."""


class _Columns:
    """Samples as they came: the number of each one's series, its times, its value."""

    def __init__(self) -> None:
        self.series = array("I")
        self.starts = array("q")
        self.ends = array("q")
        self.values = array("d")

    def append(self, series: int, sample: Sample) -> None:
        self.series.append(series)
        self.starts.append(sample.start_ns)
        self.ends.append(sample.end_ns)
        self.values.append(sample.value)


class _Block:
    """Columns that are full, compressed."""

    def __init__(self, columns: _Columns) -> None:
        self.since_ns, self.until_ns = min(columns.starts), max(columns.ends)
        self.count = len(columns.series)
        self._data = tuple(
            zlib.compress(column.tobytes(), 1)
            for column in (columns.series, columns.starts, columns.ends, columns.values)
        )

    def series(self) -> array[int]:
        """Return the numbers of its samples' series."""
        numbers = array("I")
        numbers.frombytes(zlib.decompress(self._data[0]))
        return numbers

    def columns(self) -> _Columns:
        """Return what was compressed."""
        columns = _Columns()
        columns.series = self.series()
        columns.starts.frombytes(zlib.decompress(self._data[1]))
        columns.ends.frombytes(zlib.decompress(self._data[2]))
        columns.values.frombytes(zlib.decompress(self._data[3]))
        return columns


class SampleStore:
    """Keeps samples by the time of their coming; any thread adds, any thread asks."""

    def __init__(self, max_samples: int = MAX_SAMPLES) -> None:
        self._max = max_samples
        self._series: dict[Key, _Series] = {}
        self._blocks: deque[_Block] = deque()
        self._open = _Columns()
        self._held = self._added = self._evicted = self._numbers = 0
        self._lock = threading.Lock()

    def add(self, samples: Sequence[Sample]) -> None:
        """Add *samples*; of one series they come in the order of their times."""
        with self._lock:
            for sample in samples:
                key = sample.name, sample.pid, sample.device, sample.detail
                series = self._series.get(key)
                if series is None:
                    series = self._series[key] = _Series(self._numbers, sample)
                    self._numbers += 1
                series.newest = sample
                series.total += sample.value
                series.held += 1
                self._open.append(series.number, sample)
            self._added += len(samples)
            self._held += len(samples)
            if len(self._open.series) >= BLOCK_SAMPLES:
                self._blocks.append(_Block(self._open))
                self._open = _Columns()
            while self._held > self._max and self._blocks:
                self._evict()

    def forget_before(self, time_ns: int) -> None:
        """Drop what ended before *time_ns*, but for what shares a block with younger samples."""
        with self._lock:
            while self._blocks and self._blocks[0].until_ns < time_ns:
                self._evict()

    def _evict(self) -> None:
        """Drop the oldest block; series of which nothing is left vanish with it."""
        block = self._blocks.popleft()
        self._held -= block.count
        self._evicted += block.count
        gone = Counter(block.series())
        for key, series in list(self._series.items()):
            series.held -= gone[series.number]
            if not series.held:
                del self._series[key]

    def between(self, since_ns: int, until_ns: int) -> Iterator[Sample]:
        """Yield the samples that overlap the time from *since_ns* to *until_ns*."""
        with self._lock:  # only to copy: an hour of samples would hold up who adds
            keys = {series.number: key for key, series in self._series.items()}
            blocks = [
                block
                for block in self._blocks
                if block.until_ns >= since_ns and block.since_ns <= until_ns
            ]
            newest = _Columns()
            newest.series, newest.starts = self._open.series[:], self._open.starts[:]
            newest.ends, newest.values = self._open.ends[:], self._open.values[:]
        for columns in (*(block.columns() for block in blocks), newest):
            for number, start, end, value in zip(
                columns.series, columns.starts, columns.ends, columns.values, strict=True
            ):
                if end >= since_ns and start <= until_ns:
                    name, pid, device, detail = keys[number]
                    yield Sample(name, start, end, value, pid, device, detail)

    def latest(self, not_before_ns: int) -> list[tuple[Sample, float]]:
        """Return the newest sample of each series that ended since, and the series' total."""
        with self._lock:
            return [
                (series.newest, series.total)
                for series in self._series.values()
                if series.newest.end_ns >= not_before_ns
            ]

    def counters(self) -> dict[str, float]:
        """Return samples added, and evicted to keep within bounds."""
        with self._lock:
            return {"samples": self._added, "samples_evicted": self._evicted}

    def gauges(self) -> dict[str, float]:
        """Return what is held."""
        with self._lock:
            return {"samples_held": self._held, "sample_series": len(self._series)}
