"""Lays stalls over requests: how long each stage was charged while its process stood still."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from stagescope.stages import OTHER, StageSpan, partition

CAPTURE = "capture"
"""Cause of the stretch in which a profiler was at work: what overlaps it is *profiled*."""


class Stall(NamedTuple):
    """A time in which a whole process stood still; monotonic ns."""

    cause: str
    """`loop`: a callback of the event loop was late. `gc`: the garbage collector ran. `capture`:
    a profiler started, recorded, stopped or wrote its file; the process ran, but slower."""
    start_ns: int
    end_ns: int


class StageStall(NamedTuple):
    """What one opening of a stage was charged while stalls of one cause lasted."""

    opening: int
    """Its index in the request's stages; -1 for `other`."""
    stage: str
    cause: str
    stall_ns: int


def overlap(
    stalls: Iterable[Stall], start_ns: int, duration_ns: int, stages: Iterable[StageSpan]
) -> tuple[StageStall, ...]:
    """Give what each opening of a request, and `other`, was charged during *stalls*.

    Exact for the stalls as given: the partition rule, applied to each stall's stretch alone.
    Stalls of two causes may overlap each other, so sums go by cause.
    """
    sums: dict[tuple[int, str], int] = {}
    spans = list(stages)
    for stall in stalls:
        begin = max(stall.start_ns - start_ns, 0)
        length = min(stall.end_ns - start_ns, duration_ns) - begin
        if length <= 0:
            continue
        times = [(max(0, span.start_ns - begin), span.end_ns - begin) for span in spans]
        charged, other = partition(times, length)
        for index, spent in [*enumerate(charged), (-1, other)]:
            if spent:
                key = index, stall.cause
                sums[key] = sums.get(key, 0) + spent
    return tuple(
        [
            StageStall(index, spans[index].stage if index >= 0 else OTHER, cause, spent)
            for (index, cause), spent in sorted(sums.items())
        ]
    )
