"""What the slowest requests ran that the median ones did not, from stacks laid over requests.

A stack sample belongs to the requests that were, at its time, in its stage in its process; where
those are several, each has an equal part of it. Requests are *slow* from the 99th percentile of
their durations on, *median* from the 25th to the 75th. Pure functions.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from stagescope.errors import UsageError
from stagescope.runfolder.schema import SERVER, STACKS, Table
from stagescope.stacks import Frame, StackSpan, parse_frame, short_file

SLOW_FROM = 0.99
MEDIAN = (0.25, 0.75)
NEAR_NS = 10_000_000
SAME = 1e-6


@dataclass(frozen=True, slots=True)
class StageInterval:
    """One opening of a stage, on the host's monotonic clock."""

    stage: str
    start_ns: int
    end_ns: int


@dataclass(frozen=True, slots=True)
class Request:
    """One request, as far as stacks ask."""

    pid: int
    duration_ns: int
    stages: tuple[StageInterval, ...]


@dataclass(frozen=True, slots=True)
class FrameShare:
    """How much of the samples of either class a function is in, 0 to 1."""

    stage: str
    function: str
    file: str
    slow: float
    median: float

    @property
    def difference(self) -> float:
        """Positive: the slow requests have more of it."""
        return self.slow - self.median


@dataclass(frozen=True, slots=True)
class SlowDiff:
    """Both classes of requests, and the stacks that each of them has."""

    slow_from_ns: int
    slow_requests: int
    median_requests: int
    slow: tuple[tuple[StackSpan, float], ...]
    """Stacks with the part of their time (s) that slow requests have."""
    median: tuple[tuple[StackSpan, float], ...]
    unmatched: int
    """Stacks with a stage, but no request in it at that time: other traffic, a batcher's thread."""

    def shares(self) -> list[FrameShare]:
        """Return each stage and its functions, the greatest difference first, of either sign.

        A stage's own row has no function; a function that all stacks of its stage go through
        would only say the same again, and is left out.
        """
        slow, median = _shares(self.slow), _shares(self.median)
        found = [
            FrameShare(*key, slow.get(key, 0.0), median.get(key, 0.0))
            for key in slow.keys() | median.keys()
        ]
        whole = {one.stage: one for one in found if not one.function}
        telling = [one for one in found if not one.function or not _same(one, whole[one.stage])]
        return sorted(telling, key=lambda f: (-abs(f.difference), f.stage, f.function, f.file))


def _same(one: FrameShare, other: FrameShare) -> bool:
    return abs(one.slow - other.slow) < SAME and abs(one.median - other.median) < SAME


def slow_diff(spans: Sequence[StackSpan], requests: Sequence[Request]) -> SlowDiff:
    """Lay *spans* over *requests* and part them into slow and median."""
    durations = sorted(request.duration_ns for request in requests)
    slow_from = percentile(durations, SLOW_FROM)
    low, high = (percentile(durations, share) for share in MEDIAN)
    slow: list[tuple[StackSpan, float]] = []
    median: list[tuple[StackSpan, float]] = []
    unmatched = 0
    for span, candidates in overlaid([s for s in spans if s.stage], requests):
        unmatched += not candidates
        seconds = (span.end_ns - span.start_ns) / 1e9 / max(1, len(candidates))
        of_slow = sum(one.duration_ns >= slow_from for one in candidates)
        of_median = sum(low <= one.duration_ns <= high for one in candidates)
        slow += [(span, seconds * of_slow)] if of_slow else []
        median += [(span, seconds * of_median)] if of_median else []
    return SlowDiff(
        slow_from,
        sum(duration >= slow_from for duration in durations),
        sum(low <= duration <= high for duration in durations),
        tuple(slow),
        tuple(median),
        unmatched,
    )


def percentile(ordered: Sequence[int], share: float) -> int:
    """Return the smallest of *ordered* values with *share* of them before it; 0 where there are none.

    So that from the 99th percentile on there is the slowest 1 %, and at least one.
    """
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0


def overlaid(
    spans: Sequence[StackSpan], requests: Sequence[Request]
) -> Iterator[tuple[StackSpan, list[Request]]]:
    """Yield with each span the requests that were in its stage, in its process, when it was seen.

    Where there is none, those nearest within NEAR_NS: a sampler's times may be off by so much.
    """
    openings: dict[tuple[int, str], list[_Opening]] = {}
    for number, request in enumerate(requests):
        for one in request.stages:
            opening = _Opening(one.start_ns, one.end_ns, number)
            openings.setdefault((request.pid, one.stage), []).append(opening)
    by_place: dict[tuple[int, str], list[StackSpan]] = {}
    for span in spans:
        by_place.setdefault((span.pid, span.stage), []).append(span)
    for place, there in by_place.items():
        for span, numbers in _swept(there, sorted(openings.get(place, ()))):
            yield span, [requests[number] for number in sorted(numbers)]


class _Opening(NamedTuple):
    start_ns: int
    end_ns: int
    request: int

    def off_ns(self, at_ns: int) -> int:
        """Return how far *at_ns* is outside; 0 inside."""
        return max(self.start_ns - at_ns, at_ns - self.end_ns, 0)


def _swept(
    spans: Sequence[StackSpan], openings: Sequence[_Opening]
) -> Iterator[tuple[StackSpan, set[int]]]:
    """Go through both in the order of time, and keep the openings that are near."""
    near: list[tuple[int, _Opening]] = []
    following = 0
    for span in sorted(spans, key=lambda span: span.seen_ns):
        at_ns = span.seen_ns
        while following < len(openings) and openings[following].start_ns <= at_ns + NEAR_NS:
            heapq.heappush(near, (openings[following].end_ns, openings[following]))
            following += 1
        while near and near[0][0] < at_ns - NEAR_NS:
            heapq.heappop(near)
        nearest_ns = min((opening.off_ns(at_ns) for _, opening in near), default=0)
        yield span, {one.request for _, one in near if one.off_ns(at_ns) == nearest_ns}


def _shares(weighed: Sequence[tuple[StackSpan, float]]) -> dict[tuple[str, str, str], float]:
    whole = sum(weight for _, weight in weighed) or 1.0
    shares: dict[tuple[str, str, str], float] = {}
    for span, weight in weighed:
        for function, file in {
            ("", ""),
            *_functions(span.frames),
        }:  # once a stack, however deep it recurses
            key = (span.stage, function, file)
            shares[key] = shares.get(key, 0.0) + weight / whole
    return shares


def _functions(frames: Sequence[Frame]) -> set[tuple[str, str]]:
    return {(frame.function, frame.file) for frame in frames}


_REQUEST_COLUMNS = ("pid", "start_ns", "duration_ns", "stages")


def read_stacks(folder: Path) -> list[StackSpan]:
    """Read `stacks.parquet` of the run in *folder*, in the order of time.

    Raises UsageError where there is none, or it cannot be read.
    """
    if not (folder / STACKS.file_name).exists():
        raise UsageError(
            f"{folder} has no {STACKS.file_name}: no agent sampled stacks in this run "
            "(docs/stacks.md tells when one does)"
        )
    rows = _rows(folder, STACKS, tuple(column.name for column in STACKS.columns))
    spans = [
        StackSpan(**row | {"frames": tuple([parse_frame(text) for text in row["frames"]])})
        for row in rows
    ]
    return sorted(spans, key=lambda span: span.start_ns)


def read_requests(folder: Path) -> list[Request]:
    """Read the requests of `server.parquet` with the stages that each of them went through.

    Raises UsageError where there is none, or it cannot be read.
    """
    return [
        Request(
            row["pid"],
            row["duration_ns"],
            tuple(
                StageInterval(s["stage"], row["start_ns"] + s["start_ns"],
                              row["start_ns"] + s["end_ns"])
                for s in row["stages"] or ()
            ),
        )
        for row in _rows(folder, SERVER, _REQUEST_COLUMNS)
    ]  # fmt: skip


def _rows(folder: Path, table: Table, columns: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    file = folder / table.file_name
    try:
        with pq.ParquetFile(file) as opened:
            for group in opened.iter_batches(columns=list(columns)):
                yield from group.to_pylist()
    except FileNotFoundError:
        raise UsageError(f"{folder} has no {table.file_name}") from None
    except (pa.ArrowException, OSError, KeyError) as problem:
        raise UsageError(f"{file} cannot be read: {problem}") from None


Function = tuple[str, str]
"""Name and file."""


LEAST_STACKS = 20
"""Below so many samples a share says nothing; they are counted instead."""
LEAST_SHARE = 0.005
"""What rounds to 0 % has no row."""


def top_text(spans: Sequence[StackSpan], about: str, most: int) -> str:
    """Return, for each stage, the functions by their own time and by the time below them."""
    by_stage: dict[str, list[StackSpan]] = {}
    for span in spans:
        by_stage.setdefault(span.stage, []).append(span)
    parts = [about]
    for stage, of_stage in sorted(by_stage.items(), key=lambda item: -_seconds(item[1])):
        samples = sum(span.samples for span in of_stage)
        parts.append(f"\n{stage or '(no stage)'}  {_seconds(of_stage):.2f} s, n = {samples:,}")
        if samples < LEAST_STACKS:
            parts.append(f"   fewer than {LEAST_STACKS} samples: too few for shares")
        else:
            parts += ["   self  total", *_lines(of_stage, most)]
    return "\n".join(parts) + "\n"


def _lines(spans: Sequence[StackSpan], most: int) -> list[str]:
    own: Counter[Function] = Counter()
    total: Counter[Function] = Counter()
    for span in spans:
        spent = span.end_ns - span.start_ns
        own[_function(span.frames[-1])] += spent
        for function in {_function(frame) for frame in span.frames}:
            total[function] += spent
    whole = sum(own.values()) or 1
    first = sorted(total, key=lambda function: (-own[function], -total[function], function))
    return [
        f" {own[f] / whole:6.0%} {total[f] / whole:6.0%}  {f[0]} ({short_file(f[1])})"
        for f in first[:most]
        if own[f] >= LEAST_SHARE * whole
    ]


def diff_text(diff: SlowDiff, about: str, most: int) -> str:
    """Return the functions whose shares differ most, or that there are too few samples for shares."""
    slow, median = (sum(span.samples for span, _ in side) for side in (diff.slow, diff.median))
    lines = [about, "", f"n = {slow:,} samples of slow requests, {median:,} of median ones"]
    if min(slow, median) < LEAST_STACKS:
        lines += [
            f"fewer than {LEAST_STACKS} of a class: too few for shares; a longer run has more"
        ]
        return "\n".join(lines) + "\n"
    lines += ["   slow median   diff  stage: function"]
    lines += [
        f" {f.slow:6.0%} {f.median:6.0%} {100 * f.difference:+6.0f}  "
        + (
            f"{f.stage}: {f.function} ({short_file(f.file)})"
            if f.function
            else f"{f.stage}: all of it"
        )
        for f in diff.shares()[:most]
    ]
    return "\n".join(lines) + "\n"


def _seconds(spans: Sequence[StackSpan]) -> float:
    return sum(span.end_ns - span.start_ns for span in spans) / 1e9


def _function(frame: Frame) -> Function:
    return frame.function, frame.file
