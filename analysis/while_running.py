"""How high a resource stood while a stage ran: readings weighted by the requests in the stage.

A reading tells of a stretch of time, and what was in a stage in that stretch is known exactly
from the requests' records: its weight is the integral of the number of requests in the stage.
A reading of one moment stands for the time halfway to its neighbours.
A reading is never told of one request: the driver's windows last longer than most stages do.
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

from stagescope.analysis.charged import Ints, Openings, charged
from stagescope.analysis.presence import Presence
from stagescope.analysis.sources import RunTables, row_batches, rows
from stagescope.analysis.window import Window, samples_in, unprofiled, with_timeline

GPU_BUSY = "hw.gpu.utilization"
GPU_MEMORY = "hw.gpu.memory.usage"
RSS = "process.memory.usage"
COARSE = 0.5
"""A stage that fills less of the windows that it is in cannot be told from what is beside it."""

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
    """Give the readings of *samples* in *window*: of memory of processes those of *pids*.

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
    """Give each series of *table*, which is sorted by series."""
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
    """Give the stretch that each of the sorted moments *at_ns* stands for.

    It reaches halfway to its neighbours, and never further than the median of those halves.
    """
    halves = np.diff(at_ns) // 2
    reach = int(np.median(halves)) if len(halves) else _LONE_NS
    near = np.minimum(halves, reach)
    edge = np.array([reach], np.int64)
    return at_ns - np.concatenate([edge, near]), at_ns + np.concatenate([near, edge])


class WhileRunning:
    """Weighted means of readings by stage; made once the requests have been read."""

    def __init__(self, found: Iterable[Readings]) -> None:
        """*found* are all readings that will be asked for."""
        self._readings = list(found)
        edges: dict[int, list[Ints]] = {}
        for each in self._readings:
            edges.setdefault(each.pid, []).extend((each.begin_ns, each.end_ns))
        self._presence = {
            pid: Presence(np.unique(np.concatenate(parts))) for pid, parts in edges.items()
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
        """Give the full names of the stages that were met."""
        return frozenset(name for each in self._presence.values() for name in each.stages())

    def mean(self, name: str, stages: Iterable[str]) -> Mean | None:
        """Give the mean of the readings called *name* while *stages* ran; None where none did."""
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
        """Give the median stretch that one reading called *name* tells of."""
        lengths = [each.end_ns - each.begin_ns for each in self._readings if each.name == name]
        return float(np.median(np.concatenate(lengths))) / 1e9 if lengths else None


def _openings(batch: pa.RecordBatch, counts: Ints) -> tuple[list[str], Ints, Openings]:
    """Give the stage names, each opening's name by its index, and the openings of *batch*."""
    spans = batch["stages"].flatten()
    codes, names = _codes(spans.field("stage"))
    begin = np.repeat(batch["start_ns"].to_numpy(False), counts)
    start, end, own = (
        pc.fill_null(spans.field(name), 0).to_numpy(False).astype(np.int64)
        for name in ("start_ns", "end_ns", "self_ns")
    )
    return names, codes, Openings(counts, begin + start, begin + end, own)


def _codes(column: Any) -> tuple[Ints, list[str]]:
    """Give *column* as numbers, and the text of each number; null reads as empty."""
    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = whole.cast(pa.string()).fill_null("").dictionary_encode()
    codes = encoded.indices.to_numpy(False).astype(np.int64)
    return codes, cast("list[str]", encoded.dictionary.to_pylist())
