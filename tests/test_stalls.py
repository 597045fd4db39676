"""Stalls laid over requests: what overlaps is charged by the partition rule."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from stagescope.records import SENT_BEFORE_NS, with_stalls
from stagescope.stages import StageSpan, StageStall, Stall, WaitFact, overlap, partition
from stagescope.testing.records import request_record

TIMES = st.integers(0, 1_000)
INTERVALS = st.lists(st.tuples(TIMES, TIMES).map(lambda t: (min(t), max(t))), max_size=6).map(
    sorted
)


def test_the_stage_that_opened_last_is_charged() -> None:
    """Of two stages around a stall the inner one has it; what none claims is `other`'s."""
    stages = (StageSpan("inference", 10, 90, 60), StageSpan("decode", 30, 50, 20))

    assert overlap([Stall("gc", 1_020, 1_095)], 1_000, 100, stages) == (
        StageStall(-1, "other", "gc", 5),
        StageStall(0, "inference", "gc", 50),
        StageStall(1, "decode", "gc", 20),
    )


@given(INTERVALS, st.lists(st.integers(-100, 1_100), min_size=2, max_size=6, unique=True))
def test_stalls_that_cover_a_request_cover_each_stage(
    intervals: list[tuple[int, int]], cuts: list[int]
) -> None:
    """However the time is cut into stalls, the sums are what the partition charges."""
    charged, other = partition(intervals, 1_000)
    stages = [
        StageSpan("s", start, end, spent)
        for (start, end), spent in zip(intervals, charged, strict=True)
    ]
    edges = [-200, *sorted(cuts), 1_200]
    stalls = [Stall("gc", 7 + a, 7 + b) for a, b in pairwise(edges)]

    found = {stall.opening: stall.stall_ns for stall in overlap(stalls, 7, 1_000, stages)}

    assert found == {i: spent for i, spent in [*enumerate(charged), (-1, other)] if spent}


def test_a_stop_just_before_a_request_of_a_load_run_is_told_with_it() -> None:
    """It may have been sent meanwhile; a collection, and a stop long ago, hold no such request up."""
    first = 10 * SENT_BEFORE_NS
    record = request_record(start_ns=first, run_id="run-1", stalls=(), wait_facts=())
    stops = [
        Stall("stopped", first - 900_000_000, first - 300_000_000),
        Stall("gc", first - 40, first - 20),
        Stall("stopped", first - 3 * SENT_BEFORE_NS, first - 2 * SENT_BEFORE_NS),
    ]

    told = with_stalls(record, stops)

    assert told.wait_facts == (WaitFact("stopped", -1, -900_000_000, -300_000_000),)
    assert told.stalls == ()
    assert with_stalls(request_record(start_ns=first, run_id=""), stops).wait_facts == ()
