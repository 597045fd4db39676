"""Tracks of ours in a trace that Perfetto opens: https://ui.perfetto.dev.

Chrome's trace format: a slice is a complete event (`ph` X) with µs since `baseTimeNanoseconds`
(Unix time), a process and a thread; slices of one thread lie within each other or apart, never
across. So what overlaps gets a further lane, and within a request an earlier stage ends where a
later one that outlives it begins, which is also how time is charged.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stagescope.files import replace_file
from stagescope.records import BatchRecord, Record, RequestRecord
from stagescope.stages import StageSpan

FIRST_PID = 2_000_000_000
"""Our processes in the trace; no real one is called so (Linux stops at 4,194,304)."""
LARGE_BYTES = 2_000_000
"""A file above this is compressed; Perfetto opens both."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Something that lasted; times on the records' monotonic clock."""

    name: str
    start_ns: int
    end_ns: int
    args: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Track:
    """One row; slices in it lie within each other or apart."""

    name: str
    slices: Sequence[Slice]


@dataclass(frozen=True, slots=True)
class Group:
    """Tracks under one heading."""

    name: str
    tracks: Sequence[Track]


def request_group(records: Iterable[Record]) -> Group:
    """Return the requests among *records*, each with its stages within it."""
    requests = [one for one in records if isinstance(one, RequestRecord)]
    return Group("stagescope requests", _tracks("requests", [_request(one) for one in requests]))


def batch_group(records: Iterable[Record]) -> Group:
    """Return the batches among *records*, each with its stages within it."""
    batches = [one for one in records if isinstance(one, BatchRecord)]
    return Group("stagescope batches", _tracks("batches", [_batch(one) for one in batches]))


def thread_group(stages: Mapping[str, Iterable[Slice]]) -> Group:
    """Return the stages that each thread, by its name, was in."""
    tracks = [
        track
        for name, slices in sorted(stages.items())
        for track in _tracks(name, [[one] for one in slices], nested=True)
    ]
    return Group("stagescope stages by thread", tracks)


def merged(
    trace: Mapping[str, Any], groups: Sequence[Group], wall_offset_ns: int
) -> dict[str, Any]:
    """Return *trace* with *groups* above it; *wall_offset_ns* turns their times into Unix time."""
    base_ns = int(trace.get("baseTimeNanoseconds", 0))
    ours = [
        event
        for pid, group in enumerate([one for one in groups if one.tracks], FIRST_PID)
        for event in _events(pid, group, wall_offset_ns - base_ns)
    ]
    return {**trace, "traceEvents": [*ours, *trace.get("traceEvents", [])]}


def write_trace(folder: Path, trace: Mapping[str, Any]) -> Path:
    """Write *trace* to `trace.json` in *folder*, `trace.json.gz` where it is large.

    Raises OSError; then there is no such file.
    """
    text = json.dumps(trace, separators=(",", ":")).encode()
    large = len(text) > LARGE_BYTES
    file = folder / ("trace.json.gz" if large else "trace.json")
    replace_file(file, gzip.compress(text, 6) if large else text, mode=0o666)
    return file


def lanes(families: Iterable[Sequence[Slice]], *, nested: bool = False) -> list[list[Slice]]:
    """Lay *families* (a slice, and what lies within it) in as few rows as are needed.

    A family goes to the first row where the one before it has ended; *nested*: or where it lies
    within the one before it.
    """
    rows: list[list[Slice]] = []
    ends: list[list[int]] = []
    """By row: the ends of what is open there, innermost last."""
    for family in sorted(families, key=lambda one: (one[0].start_ns, -one[0].end_ns)):
        head = family[0]
        place = next((at for at, its in enumerate(ends) if _fits(its, head, nested)), len(rows))
        if place == len(rows):
            rows.append([])
            ends.append([])
        rows[place].extend(family)
        ends[place].append(head.end_ns)
    return rows


def _fits(ends: list[int], head: Slice, nested: bool) -> bool:
    while ends and ends[-1] <= head.start_ns:
        ends.pop()
    return not ends or (nested and head.end_ns <= ends[-1])


def _tracks(name: str, families: Iterable[Sequence[Slice]], *, nested: bool = False) -> list[Track]:
    return [
        Track(name if number == 1 else f"{name} ({number})", row)
        for number, row in enumerate(lanes(families, nested=nested), 1)
    ]


def _request(record: RequestRecord) -> list[Slice]:
    args = {
        "trace_id": record.trace_id,
        "span_id": record.span_id,
        "status": record.status,
        "batch_ids": list(record.batch_ids),
        "run_id": record.run_id,
    }
    end_ns = record.start_ns + record.duration_ns
    whole = Slice(f"{record.method} {record.route or record.path}", record.start_ns, end_ns, args)
    ids = {"trace_id": record.trace_id, "span_id": record.span_id}
    return [whole, *_stages(record.stages, record.start_ns, ids)]


def _batch(record: BatchRecord) -> list[Slice]:
    args = {
        "batch_id": record.batch_id,
        "trace_id": record.trace_id,
        "size": record.size,
        "device_ns": record.device_ns,
        "members": [member.span_id for member in record.members],
    }
    end_ns = record.start_ns + record.duration_ns
    whole = Slice(f"batch {record.model}".strip(), record.start_ns, end_ns, args)
    return [whole, *_stages(record.stages, record.start_ns, {"batch_id": record.batch_id})]


def _stages(
    stages: Iterable[StageSpan], start_ns: int, ids: Mapping[str, Any]
) -> Iterator[Slice]:  # fmt: skip
    """Return *stages* so that they lie within each other or apart."""
    told: list[Slice] = []
    around: list[int] = []
    for span in sorted(stages, key=lambda one: (one.start_ns, -one.end_ns)):
        args = {**ids, "self_ns": span.self_ns, "failed": span.failed}
        one = Slice(span.stage, start_ns + span.start_ns, start_ns + span.end_ns, args)
        while around and told[around[-1]].end_ns <= one.start_ns:
            around.pop()
        for index in around:
            if told[index].end_ns < one.end_ns:
                told[index] = replace(told[index], end_ns=one.start_ns)
        around = [index for index in around if told[index].end_ns > one.start_ns]
        around.append(len(told))
        told.append(one)
    return iter(told)


def _events(pid: int, group: Group, offset_ns: int) -> Iterator[dict[str, Any]]:
    yield _named("process_name", pid, 0, name=group.name)
    yield _named("process_sort_index", pid, 0, sort_index=pid - 2 * FIRST_PID)
    for tid, track in enumerate(group.tracks, 1):
        yield _named("thread_name", pid, tid, name=track.name)
        yield _named("thread_sort_index", pid, tid, sort_index=tid)
        for one in track.slices:
            yield {
                "ph": "X",
                "cat": "stagescope",
                "name": one.name,
                "pid": pid,
                "tid": tid,
                "ts": (one.start_ns + offset_ns) / 1e3,
                "dur": (one.end_ns - one.start_ns) / 1e3,
                "args": dict(one.args),
            }


def _named(what: str, pid: int, tid: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "ts": 0, "args": args}
