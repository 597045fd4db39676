"""How sure a percentile is: the interval between two order statistics, without an assumption on
the distribution; none where there are too few requests."""

from __future__ import annotations

from math import ceil, exp, lgamma, log, sqrt

CONFIDENCE = 0.95
_SIGMAS = 10


def ranks(count: int, quantile: float) -> tuple[int, int] | None:
    """Return the ranks, from 0, between which *quantile* of *count* values lies; None: too few.

    Of the population's quantile, with CONFIDENCE or a little more (David and Nagaraja, Order
    Statistics, 7.1).
    """
    beyond = (1 - CONFIDENCE) / 2
    middle, spread = count * quantile, sqrt(count * quantile * (1 - quantile))
    first = max(0, int(middle - _SIGMAS * spread) - 1)
    last = min(count, ceil(middle + _SIGMAS * spread) + 1)
    below = 0.0
    low = high = -1
    for below_it in range(first, last + 1):
        before = below
        below += _binomial(count, below_it, quantile)
        if below <= beyond:
            low = below_it
        if high < 0 and below >= 1 - beyond and before < 1 - beyond:
            high = below_it
    if low < 0 or high < 0 or high > count - 1:
        return None
    return low, high


def least(quantile: float) -> int:
    """Return how many values it takes at least for an interval round *quantile*."""
    return ceil(log((1 - CONFIDENCE) / 2) / log(max(quantile, 1 - quantile)))


def _binomial(count: int, hits: int, chance: float) -> float:
    ways = lgamma(count + 1) - lgamma(hits + 1) - lgamma(count - hits + 1)
    return exp(ways + hits * log(chance) + (count - hits) * log(1 - chance))
