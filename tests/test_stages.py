"""The partition rule: each nanosecond of a timeline is charged once, to the stage opened last."""

from hypothesis import example, given
from hypothesis import strategies as st

from stagescope.stages import KNOWN, OTHER, STAGES, StageSpan, opened_last, partition, stage_of

DURATION = 40
TIMES = st.integers(-3, DURATION + 3)
INTERVALS = st.lists(st.tuples(TIMES, TIMES), max_size=9).map(
    lambda intervals: sorted(intervals, key=lambda interval: interval[0])
)


def test_of_the_open_stages_the_one_opened_last_is_charged() -> None:
    """By time; of two that were opened together, the later in the list; of none, none."""
    early, first, second = (
        StageSpan(name, at, 9, 0) for name, at in [("early", 1), ("first", 5), ("second", 5)]
    )
    assert opened_last([first, second, early]) is second
    assert opened_last([second, first]) is first
    assert opened_last([]) is None


def naive(intervals: list[tuple[int, int]], duration: int) -> tuple[list[int], int]:
    """Ask each nanosecond on its own, by the rule itself."""
    charged = [0] * len(intervals)
    other = 0
    for instant in range(duration):
        last = opened_last(
            [
                StageSpan(str(index), max(0, start), end, 0)
                for index, (start, end) in enumerate(intervals)
                if start <= instant < end
            ]
        )
        if last:
            charged[int(last.stage)] += 1
        else:
            other += 1
    return charged, other


@given(INTERVALS, st.integers(0, DURATION))
@example([(0, 10), (0, 10)], 10)
@example([(0, 10), (5, 5), (5, 20)], 12)
@example([(0, 4), (1, 9), (2, 3)], 9)
def test_partition_agrees_with_asking_each_nanosecond(
    intervals: list[tuple[int, int]], duration: int
) -> None:
    """Nested, overlapping, empty, reversed and overhanging intervals are charged as told."""
    assert partition(intervals, duration) == naive(intervals, duration)


@given(
    st.lists(st.tuples(st.integers(0, 10**12), st.integers(0, 10**12)), max_size=60).map(sorted),
    st.integers(0, 10**12),
)
def test_partition_sums_to_the_duration(intervals: list[tuple[int, int]], duration: int) -> None:
    """Nothing is lost and nothing charged twice, whatever overlaps."""
    charged, other = partition(intervals, duration)

    assert sum(charged) + other == duration
    assert min([other, *charged]) >= 0
    for spent, (start, end) in zip(charged, intervals, strict=True):
        assert spent <= max(0, end - start)


def test_nothing_open_is_other() -> None:
    """A timeline without stages is `other` from end to end."""
    assert partition([], 7) == ([], 7)


def test_every_known_name_belongs_to_a_stage() -> None:
    """Sub-stages carry their stage before the dot, and codes keep `other` first."""
    assert KNOWN[0] == OTHER
    assert len(set(KNOWN)) == len(KNOWN)
    assert {stage_of(name) for name in KNOWN} == {OTHER, *STAGES}
