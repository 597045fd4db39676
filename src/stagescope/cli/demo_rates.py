"""Which three rates the demo drives, from what the machine bears."""

from __future__ import annotations

import math
from typing import NamedTuple

from stagescope.errors import StagescopeError

LOW_SHARE, MIDDLE_SHARE, OVER_SHARE = 0.3, 0.7, 1.3


class Rates(NamedTuple):
    """Requests a second; the field names are what the demo calls its runs."""

    low: float
    middle: float
    over: float


def choose_rates(capacity_per_s: float) -> Rates:
    """Give a quiet, a busy and a too high rate for a server that answers *capacity_per_s*.

    Rounded to two digits, which moves none of them across the capacity.
    Raises StagescopeError where the capacity is no positive number.
    """
    if not (math.isfinite(capacity_per_s) and capacity_per_s > 0):
        raise StagescopeError(
            f"the probe found a capacity of {capacity_per_s} requests/s, so no rate can be chosen: "
            "look into the server's log"
        )
    return Rates(
        *(_two_digits(capacity_per_s * share) for share in (LOW_SHARE, MIDDLE_SHARE, OVER_SHARE))
    )


def _two_digits(value: float) -> float:
    return float(f"{value:.1e}")
