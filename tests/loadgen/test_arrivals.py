"""Arrivals are a pure function of seed, rate and duration."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.errors import UsageError
from stagescope.loadgen.arrivals import ARRIVALS, schedule

rates = st.floats(0.5, 5_000)
durations = st.floats(0.01, 2)
seeds = st.integers(0, 2**64)


@given(st.sampled_from(sorted(ARRIVALS)), rates, durations, seeds)
def test_same_seed_same_schedule_in_order_and_in_time(
    arrivals: str, rate: float, duration: float, seed: int
) -> None:
    """A schedule repeats to the nanosecond, ascends, and lies inside its duration."""
    offsets = ARRIVALS[arrivals](rate, duration, seed)
    assert offsets == ARRIVALS[arrivals](rate, duration, seed)
    assert all(a <= b for a, b in pairwise(offsets))
    assert all(0 <= at <= duration * 1e9 for at in offsets)


@given(rates, durations)
def test_constant_is_evenly_spaced(rate: float, duration: float) -> None:
    """The k-th constant arrival is at k/rate, rounded once and not summed up."""
    offsets = ARRIVALS["constant"](rate, duration, 0)
    assert list(offsets) == [round(k * 1_000_000_000 / rate) for k in range(len(offsets))]
    assert abs(len(offsets) - rate * duration) <= 1


def test_poisson_has_the_rate_and_the_spread_of_a_poisson_process() -> None:
    """Over 20,000 arrivals the mean gap is 1/rate and its deviation is as large as its mean."""
    offsets = ARRIVALS["poisson"](1_000, 20, 7)
    gaps = [b - a for a, b in pairwise(offsets)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert 0.97e6 < mean < 1.03e6
    assert 0.95 < deviation / mean < 1.05


def test_other_seed_other_schedule() -> None:
    """Two seeds give two schedules."""
    assert ARRIVALS["poisson"](100, 1, 1) != ARRIVALS["poisson"](100, 1, 2)


@pytest.mark.parametrize("rate", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_rate_without_sense_is_refused_with_its_limits(rate: float) -> None:
    """The sentence names the rate and what it may be."""
    with pytest.raises(UsageError, match=r"rate .* above 0 and at most 100,000"):
        schedule("poisson", rate, 1, 0, 0)


@pytest.mark.parametrize("duration", [0, -1, float("nan"), float("inf"), 1e9])
def test_a_duration_without_sense_is_refused_with_its_limits(duration: float) -> None:
    """The sentence names the duration and what it may be."""
    with pytest.raises(UsageError, match=r"duration .* above 0 and at most 604,800"):
        schedule("poisson", 1, duration, 0, 0)


@pytest.mark.parametrize("warmup", [-1, float("nan"), float("inf")])
def test_a_warm_up_without_sense_is_refused(warmup: float) -> None:
    """The sentence names the warm-up."""
    with pytest.raises(UsageError, match="warm-up"):
        schedule("poisson", 1, 1, warmup, 0)


def test_plans_without_a_request_or_with_too_many_are_refused() -> None:
    """A plan must hold a measured request, and no more than one run keeps."""
    with pytest.raises(UsageError, match="plans no request"):
        schedule("poisson", 0.001, 0.001, 0, 0)
    with pytest.raises(UsageError, match="10,000,000"):
        schedule("poisson", 100_000, 3_600, 0, 0)


def test_unknown_arrivals_are_refused_with_the_known_ones() -> None:
    """The sentence lists what there is."""
    with pytest.raises(UsageError, match="poisson or constant"):
        schedule("bursty", 1, 1, 0, 0)
