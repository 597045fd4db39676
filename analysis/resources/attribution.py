"""How high a resource stood while a stage ran: readings weighted by the requests in the stage.

A reading covers a stretch of time, and how many requests were in a stage during it is known
exactly from their records: its weight is the integral of the number of requests in the stage.
A reading of one moment stands for the time halfway to its neighbours.
A reading is never attributed to one request: the driver's windows last longer than most stages.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import ibis.expr.types as ir
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from stagescope.analysis.resources.window import Window, samples_in, unprofiled, with_timeline
from stagescope.analysis.sources import RunTables, row_batches, rows

# When exactly each stage was charged: a request's timeline as segments, many requests at once.
#
# The rule of `stagescope.stages.opened_last`, in NumPy: `stages.partition` returns sums, this stretches.


Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_MAX_CELLS = 4_000_000
"""Comparisons at a time: what bounds the memory of timelines with nested stages."""


@dataclass(frozen=True, slots=True)
class Openings:
    """Openings of stages, request after request, each request's in the order of its list."""

    counts: Ints
    """How many openings each request has."""
    start_ns: Ints
    end_ns: Ints
    self_ns: Ints
    """What the partition charges to each opening."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Stretches of time, and the opening (by its index) that each is charged to."""

    start_ns: Ints
    end_ns: Ints
    opening: Ints


def charged(openings: Openings) -> Segments:
    """Return the segments of *openings*: of each opening they last its `self_ns` together.

    Times are of one clock. A request in which no stage was opened inside another is ready as
    it stands; only the others are swept.
    """
    length = np.maximum(openings.end_ns - openings.start_ns, 0)
    request = np.repeat(np.arange(len(openings.counts)), openings.counts)
    nested = np.zeros(len(openings.counts), np.bool_)
    nested[request[openings.self_ns != length]] = True
    (plain,) = np.nonzero(~nested[request] & (length > 0))
    found = [Segments(openings.start_ns[plain], openings.end_ns[plain], plain)]
    first = np.cumsum(openings.counts) - openings.counts
    for width in np.unique(openings.counts[nested]):
        (rows,) = np.nonzero(nested & (openings.counts == width))
        step = max(1, _MAX_CELLS // int(2 * width * width))
        for begin in range(0, len(rows), step):
            index = first[rows[begin : begin + step], None] + np.arange(width)
            found.append(_swept(openings, index))
    return Segments(
        *(
            np.concatenate([getattr(part, name) for part in found])
            for name in ("start_ns", "end_ns", "opening")
        )
    )


def _swept(openings: Openings, index: Ints) -> Segments:
    """Sweep requests with equally many openings; *index* is (request, opening)."""
    starts, ends = openings.start_ns[index], openings.end_ns[index]
    # In the order of opening, so that the last of those open is the one that was opened last.
    order = np.argsort(starts, axis=1, kind="stable")
    starts, ends, index = (np.take_along_axis(a, order, 1) for a in (starts, ends, index))
    edges = np.sort(np.concatenate([starts, ends], axis=1), axis=1)
    begin, end = edges[:, :-1], edges[:, 1:]
    is_open: Bools = (starts[:, None, :] <= begin[:, :, None]) & (
        ends[:, None, :] > begin[:, :, None]
    )
    last = starts.shape[1] - 1 - np.argmax(is_open[:, :, ::-1], axis=2)
    kept = is_open.any(axis=2) & (end > begin)
    return Segments(begin[kept], end[kept], np.take_along_axis(index, last, 1)[kept])


def integral(starts_ns: Ints, ends_ns: Ints, at_ns: Ints) -> Ints:
    """Return, at each of *at_ns*, the request-nanoseconds so far of segments `[start, end)`.

    The number of segments that hold a moment is piecewise constant, so its integral is piecewise
    linear and exact in whole nanoseconds: a start adds `t - start`, an end takes `t - end` away.
    """
    return _ramp(np.sort(starts_ns), at_ns) - _ramp(np.sort(ends_ns), at_ns)


def _ramp(edges: Ints, at_ns: Ints) -> Ints:
    """Return the sum over *edges* of `max(0, t - edge)` for each t.

    A sum may pass 2**63 and wrap; the difference of two of them, which is small, is right again.
    """
    passed = np.searchsorted(edges, at_ns, side="right")
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(edges, dtype=np.int64)])
    ramp: Ints = passed * at_ns - before[passed]
    return ramp


class ConcurrencyIntegral:
    """Request-nanoseconds by stage up to each moment of a grid; fed chunk by chunk."""

    def __init__(self, at_ns: Ints) -> None:
        """*at_ns* is the grid: sorted moments, each once."""
        self.at_ns = at_ns
        self._sums: dict[str, Ints] = {}

    def add(self, stage: str, starts_ns: Ints, ends_ns: Ints) -> None:
        """Take up segments of *stage*."""
        found = integral(starts_ns, ends_ns, self.at_ns)
        before = self._sums.get(stage)
        self._sums[stage] = found if before is None else before + found

    def stages(self) -> tuple[str, ...]:
        """Return the stages that were taken up."""
        return tuple(self._sums)

    def between(self, stage: str, starts_ns: Ints, ends_ns: Ints) -> Ints:
        """Return the request-nanoseconds of *stage* in each stretch; its ends are of the grid."""
        sums = self._sums[stage]
        first, last = (np.searchsorted(self.at_ns, edge) for edge in (starts_ns, ends_ns))
        return sums[last] - sums[first]


GPU_BUSY = "hw.gpu.utilization"
GPU_MEMORY = "hw.gpu.memory.usage"
RSS = "process.memory.usage"
COARSE = 0.5
"""A stage that fills a smaller share of its windows cannot be separated from what runs beside it."""

_LONE_NS = 500_000_000
"""How far to each side a reading of one moment reaches that has no neighbour."""
_REQUESTS_AT_A_TIME = 65_536

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Readings:
    """All readings of one kind that requests are weighted over: of one process, or of all."""

    name: str
    pid: int
    """0: weighted by the requests of all processes."""
    begin_ns: Ints
    end_ns: Ints
    value: Floats


@dataclass(frozen=True, slots=True)
class Mean:
    """A weighted mean, and what it stands on."""

    value: float
    weight_ns: int
    fill: float
    """Mean share of a reading's stretch in which the stage had a request (at most; weighted)."""


def readings(
    samples: ir.Table, window: Window, pids: Collection[int], devices: Collection[str] = ()
) -> list[Readings]:
    """Return the readings of *samples* in *window*: of memory of processes those of *pids*.

    Of the devices those of *devices*; of all where none of these was read.
    """
    found = samples_in(samples, window, GPU_BUSY, GPU_MEMORY, RSS)
    read = {row["device"] for row in rows(found.select("device").distinct())}
    chosen = sorted(read.intersection(devices) or read)
    of_process = (found.name == RSS) & found.pid.isin(sorted(pids))
    kept = found.filter(of_process | ((found.name != RSS) & found.device.isin(chosen)))
    table = kept.order_by("name", "pid", "device", "detail", "begin_ns").to_pyarrow()
    series: dict[tuple[str, int], list[Readings]] = {}
    for (name, pid), part in _series(table):
        series.setdefault((name, pid), []).append(_widened(name, pid, part, window))
    return [
        Readings(
            name,
            pid,
            np.concatenate([part.begin_ns for part in parts]),
            np.concatenate([part.end_ns for part in parts]),
            np.concatenate([part.value for part in parts]),
        )
        for (name, pid), parts in series.items()
    ]


def _series(table: pa.Table) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """Yield each series of *table*, which is sorted by series."""
    if not table.num_rows:
        return
    changes = np.zeros(table.num_rows, np.bool_)
    changes[0] = True
    for key in ("name", "pid", "device", "detail"):
        codes = _codes(table[key])[0]
        changes[1:] |= codes[1:] != codes[:-1]
    edges = [*np.flatnonzero(changes).tolist(), table.num_rows]
    for first, last in pairwise(edges):
        part = table.slice(first, last - first)
        yield (part["name"][0].as_py(), part["pid"][0].as_py()), part


def _widened(name: str, pid: int, part: pa.Table, window: Window) -> Readings:
    begin = part["begin_ns"].to_numpy().astype(np.int64)
    end = part["end_ns"].to_numpy().astype(np.int64)
    moments = begin == end
    if moments.any():
        begin, end = begin.copy(), end.copy()
        begin[moments], end[moments] = cells(begin[moments])
        begin, end = np.maximum(begin, window.begin_ns), np.minimum(end, window.end_ns)
    return Readings(name, pid, begin, end, part["value"].to_numpy().astype(np.float64))


def cells(at_ns: Ints) -> tuple[Ints, Ints]:
    """Return the stretch that each of the sorted moments *at_ns* stands for.

    It reaches halfway to its neighbours, and never further than the median of those halves.
    """
    halves = np.diff(at_ns) // 2
    reach = int(np.median(halves)) if len(halves) else _LONE_NS
    near = np.minimum(halves, reach)
    edge = np.array([reach], np.int64)
    return at_ns - np.concatenate([edge, near]), at_ns + np.concatenate([near, edge])


class StageWeightedMeans:
    """Weighted means of readings by stage; made once the requests have been read."""

    def __init__(self, found: Iterable[Readings]) -> None:
        """*found* are all readings that will be asked for."""
        self._readings = list(found)
        edges: dict[int, list[Ints]] = {}
        for each in self._readings:
            edges.setdefault(each.pid, []).extend((each.begin_ns, each.end_ns))
        self._presence = {
            pid: ConcurrencyIntegral(np.unique(np.concatenate(parts)))
            for pid, parts in edges.items()
        }

    def read(self, tables: RunTables) -> None:
        """Take up the requests of *tables*, chunk by chunk; profiled ones are left out."""
        if not self._presence:
            return
        known = unprofiled(with_timeline(tables.server))
        chosen = known.select(pid=known.pid.fill_null(0), start_ns="start_ns", stages="stages")
        for batch in row_batches(tables, chosen, _REQUESTS_AT_A_TIME):
            self._take(batch)

    def _take(self, batch: pa.RecordBatch) -> None:
        counts = pc.fill_null(pc.list_value_length(batch["stages"]), 0).to_numpy(False)
        names, names_of, openings = _openings(batch, counts.astype(np.int64))
        found = charged(openings)
        pids = np.repeat(batch["pid"].to_numpy(False), counts)[found.opening]
        stage = names_of[found.opening]
        for pid, presence in self._presence.items():
            mine = np.ones(len(pids), np.bool_) if pid == 0 else pids == pid
            for code in np.unique(stage[mine]):
                own = mine & (stage == code)
                presence.add(names[code], found.start_ns[own], found.end_ns[own])

    def stages(self) -> frozenset[str]:
        """Return the full names of the stages that were met."""
        return frozenset(name for each in self._presence.values() for name in each.stages())

    def mean(self, name: str, stages: Iterable[str]) -> Mean | None:
        """Return the mean of the readings called *name* while *stages* ran; None where none did."""
        kept = list(stages)
        total, summed, filled = 0, 0.0, 0.0
        for each in self._readings:
            if each.name != name:
                continue
            weight = self._weight(each, kept)
            length = np.maximum(each.end_ns - each.begin_ns, 1)
            total += int(weight.sum())
            summed += float((weight * each.value).sum())
            filled += float((weight * np.minimum(1.0, weight / length)).sum())
        return Mean(summed / total, total, filled / total) if total else None

    def _weight(self, each: Readings, stages: Iterable[str]) -> Ints:
        presence = self._presence[each.pid]
        met = set(presence.stages())
        weight = np.zeros(len(each.begin_ns), np.int64)
        for stage in stages:
            if stage in met:
                weight += presence.between(stage, each.begin_ns, each.end_ns)
        return weight

    def median_window_s(self, name: str) -> float | None:
        """Return the median length of time that one reading called *name* covers."""
        lengths = [each.end_ns - each.begin_ns for each in self._readings if each.name == name]
        return float(np.median(np.concatenate(lengths))) / 1e9 if lengths else None


def _openings(batch: pa.RecordBatch, counts: Ints) -> tuple[list[str], Ints, Openings]:
    """Return the stage names, each opening's name by its index, and the openings of *batch*."""
    spans = batch["stages"].flatten()
    codes, names = _codes(spans.field("stage"))
    begin = np.repeat(batch["start_ns"].to_numpy(False), counts)
    start, end, own = (
        pc.fill_null(spans.field(name), 0).to_numpy(False).astype(np.int64)
        for name in ("start_ns", "end_ns", "self_ns")
    )
    return names, codes, Openings(counts, begin + start, begin + end, own)


def _codes(column: Any) -> tuple[Ints, list[str]]:
    """Return *column* as numbers, and the text of each number; null reads as empty."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = whole.cast(pa.string()).fill_null("").dictionary_encode()
    codes = encoded.indices.to_numpy(False).astype(np.int64)
    return codes, cast("list[str]", encoded.dictionary.to_pylist())
