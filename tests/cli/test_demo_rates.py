"""The demo's three rates."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.cli.demo import choose_rates
from stagescope.errors import StagescopeError


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_rates_lie_around_the_capacity(capacity: float) -> None:
    """Whatever the machine bears, two rates are below it, apart, and one is clearly over it."""
    rates = choose_rates(capacity)

    assert 0.2 * capacity < rates.low < 0.4 * capacity
    assert 0.6 * capacity < rates.middle < 0.8 * capacity
    assert 1.2 * capacity < rates.over < 1.4 * capacity


@given(st.floats(min_value=1e-3, max_value=1e9))
def test_rates_are_easy_to_read(capacity: float) -> None:
    """Each rate has two digits that count."""
    for rate in choose_rates(capacity):
        assert float(f"{rate:.2g}") == rate


@pytest.mark.parametrize("capacity", [0.0, -1.0, math.nan, math.inf])
def test_no_capacity_is_said(capacity: float) -> None:
    """A probe that found nothing ends the demo with a sentence, not with rates of 0."""
    with pytest.raises(StagescopeError, match="no rate can be chosen"):
        choose_rates(capacity)
