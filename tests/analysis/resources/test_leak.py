"""The slope of memory over a run: what is told to be a leak, and what is not."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.analysis.resources.leak import LEAST_SPAN_S, slope

S = 1_000_000_000
MB = 1e6

SERIES = st.lists(
    st.tuples(st.integers(0, 3600 * S), st.integers(0, 10**11).map(float)), max_size=40
)


def series(seconds: int, per_s: float, scatter: float, seed: int) -> list[tuple[int, float]]:
    """Return one reading a second, of which each remembers most of what the last one was off by."""
    chance = random.Random(seed)
    off = 0.0
    found = []
    for i in range(seconds):
        off = 0.8 * off + chance.gauss(0, scatter)
        found.append((i * S, 1e9 + per_s * i + off))
    return found


@pytest.mark.parametrize("seed", range(8))
def test_a_leak_is_told_with_its_slope(seed: int) -> None:
    """Memory that grows by 1 MB a second amid scatter is a leak of about that."""
    found = slope(series(300, MB, 2 * MB, seed))

    assert found.leak, found.doubt
    assert found.per_s == pytest.approx(MB, rel=0.1)


@pytest.mark.parametrize("seed", range(8))
def test_scatter_is_no_leak(seed: int) -> None:
    """Memory that goes up and down, each reading like the last one, is not told to leak."""
    assert not slope(series(300, 0.0, 2 * MB, seed)).leak


def test_a_server_that_warms_up_does_not_leak() -> None:
    """What grows fast at first and ever slower then is told to be warming up."""
    found = slope([(i * S, 1e9 * (1 - math.exp(-i / 60))) for i in range(300)])

    assert found.per_s > 0
    assert "warming up" in found.doubt


def test_one_step_is_no_leak() -> None:
    """A cache that was filled once grew, but not all the time."""
    assert not slope([(i * S, 1e9 + (200 * MB if i > 150 else 0)) for i in range(300)]).leak


def test_a_leak_in_steps_is_told() -> None:
    """An allocator that takes memory piece by piece leaks all the same."""
    assert slope([(i * S, 1e9 + i // 20 * 4 * MB) for i in range(300)]).leak


def test_collections_do_not_hide_a_leak() -> None:
    """A saw that a garbage collector makes leaks only where its teeth rise."""
    level = [(i * S, 1e9 + i % 30 * MB) for i in range(600)]
    rising = [(ns, value + 0.2 * MB * ns / S) for ns, value in level]

    assert not slope(level).leak
    assert slope(rising).leak


def test_a_short_run_tells_nothing() -> None:
    """Below the least span the slope is given, and why no leak is told."""
    found = slope(series(int(LEAST_SPAN_S), MB, 0.0, 0))

    assert found.per_s == pytest.approx(MB)
    assert "too short" in found.doubt


@given(SERIES)
def test_anything_has_a_slope(readings: list[tuple[int, float]]) -> None:
    """Any readings, none included, give a finite slope, and a reason or none."""
    found = slope(readings)

    assert math.isfinite(found.per_s)
    assert found.leak == (found.doubt == "")


@given(SERIES, st.integers(-(10**12), 10**12), st.integers(1, 1000))
def test_the_slope_does_not_depend_on_where_one_counts_from(
    readings: list[tuple[int, float]], later_ns: int, bytes_more: int
) -> None:
    """Other clocks and higher levels change nothing; order of the readings neither."""
    moved = [(ns + later_ns, value + bytes_more) for ns, value in reversed(readings)]

    assert slope(moved).per_s == pytest.approx(slope(readings).per_s, rel=1e-6, abs=1e-3)


@given(SERIES, st.sampled_from([2.0, 0.5, 1024.0]))
def test_the_slope_is_in_the_readings_unit(
    readings: list[tuple[int, float]], factor: float
) -> None:
    """In KiB it is so many KiB a second: powers of two change no digit."""
    scaled = slope([(ns, value * factor) for ns, value in readings])

    assert scaled.per_s == slope(readings).per_s * factor


@given(st.integers(200, 1000), st.integers(-1000, 1000))
def test_long_runs_keep_their_slope(seconds: int, per_s: int) -> None:
    """A straight line has its slope however long it is; falling is no leak, nor is standing."""
    found = slope([(i * S, float(per_s * i)) for i in range(seconds)])

    assert found.per_s == pytest.approx(per_s)
    assert found.points == seconds
    assert found.leak == (per_s > 0)
