"""Segments are the partition rule, stretch by stretch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stagescope.analysis.resources.attribution import Openings, Segments, charged
from stagescope.stages import StageSpan, opened_last, partition

SPAN = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda s: (min(s), max(s)))
REQUESTS = st.lists(st.lists(SPAN, max_size=6), min_size=1, max_size=8)


def of(requests: Sequence[Sequence[tuple[int, int]]]) -> Segments:
    """Return the segments of requests whose openings are in the order of the list."""
    flat = [span for spans in requests for span in spans]
    own = [spent for spans in requests for spent in partition(spans, 100)[0]]
    counts = np.array([len(spans) for spans in requests], np.int64)
    starts, ends = (np.array([span[i] for span in flat], np.int64) for i in (0, 1))
    return charged(Openings(counts, starts, ends, np.array(own, np.int64)))


@given(REQUESTS)
def test_each_opening_gets_what_the_partition_charges(
    requests: list[list[tuple[int, int]]],
) -> None:
    """The segments of an opening last its `self_ns` together, to the nanosecond."""
    found = of(requests)
    own = [spent for spans in requests for spent in partition(spans, 100)[0]]

    sums = np.zeros(len(own), np.int64)
    np.add.at(sums, found.opening, found.end_ns - found.start_ns)

    assert sums.tolist() == own


@given(st.lists(SPAN, max_size=6))
def test_each_moment_is_charged_once(spans: list[tuple[int, int]]) -> None:
    """At every instant of a request that is in a stage, the opening that the one rule names."""
    found = of([spans])

    for moment in range(60):
        at = [
            int(opening)
            for start, end, opening in zip(found.start_ns, found.end_ns, found.opening, strict=True)
            if start <= moment < end
        ]
        is_open = [
            StageSpan(str(index), start, end, 0)
            for index, (start, end) in enumerate(spans)
            if start <= moment < end
        ]
        last = opened_last(is_open)
        assert at == ([int(last.stage)] if last else [])


def test_a_stage_inside_another_takes_its_time() -> None:
    """What is opened last is charged; what it lies in gets the time before and after."""
    found = of([[(0, 10), (3, 5)], [(20, 30)]])
    segments = sorted(zip(found.start_ns, found.end_ns, found.opening, strict=True))

    assert segments == [(0, 3, 0), (3, 5, 1), (5, 10, 0), (20, 30, 2)]
