"""When each request is to be sent: pure functions of rate, duration and seed.

Open loop: the schedule is made before the run and nothing that the server does can move it.
Offsets are nanoseconds since the schedule's start, ascending, all before its end.
"""

from __future__ import annotations

import math
import random
from array import array
from collections.abc import Callable
from dataclasses import dataclass

from stagescope.errors import UsageError

MAX_RATE_PER_S = 100_000.0
"""Ten times what one core sends; a plan beyond it is a slip of the pen."""
MAX_REQUESTS = 10_000_000
"""About 2.5 GB of client records."""
MAX_DURATION_S = 7 * 24 * 3600.0

SECOND_NS = 1_000_000_000


def constant(rate_per_s: float, duration_s: float, seed: int) -> array[int]:
    """Evenly spaced arrivals, the first at 0; *seed* has no say here."""
    count = math.ceil(rate_per_s * duration_s - 1e-9)
    return array("q", (round(k * SECOND_NS / rate_per_s) for k in range(count)))


def poisson(rate_per_s: float, duration_s: float, seed: int) -> array[int]:
    """Independent arrivals: exponential gaps with mean 1/rate (a Poisson process)."""
    gap_s = random.Random(seed).expovariate
    offsets = array("q")
    at = gap_s(rate_per_s)
    while at < duration_s:
        offsets.append(int(at * SECOND_NS))
        at += gap_s(rate_per_s)
    return offsets


ARRIVALS: dict[str, Callable[[float, float, int], array[int]]] = {
    "poisson": poisson,
    "constant": constant,
}


@dataclass(frozen=True, slots=True)
class Schedule:
    """A run's arrivals: those before `measure_from_ns` are warm-up."""

    offsets_ns: array[int]
    measure_from_ns: int
    end_ns: int


def schedule(
    arrivals: str, rate_per_s: float, duration_s: float, warmup_s: float, seed: int
) -> Schedule:
    """Plan warm-up and measured phase as one stream of arrivals at one rate.

    Raises UsageError, which names the parameter and its limits.
    """
    _check(arrivals, rate_per_s, duration_s, warmup_s)
    whole_s = warmup_s + duration_s
    offsets = ARRIVALS[arrivals](rate_per_s, whole_s, seed)
    measure_from_ns = round(warmup_s * SECOND_NS)
    if not offsets or offsets[-1] < measure_from_ns:
        raise UsageError(
            f"{rate_per_s:g} requests/s for {duration_s:g} s plans no request: "
            "raise the rate or the duration"
        )
    return Schedule(offsets, measure_from_ns, round(whole_s * SECOND_NS))


def _check(arrivals: str, rate_per_s: float, duration_s: float, warmup_s: float) -> None:
    if arrivals not in ARRIVALS:
        raise UsageError(f"arrivals {arrivals!r} is not known: take {' or '.join(ARRIVALS)}")
    if not 0 < rate_per_s <= MAX_RATE_PER_S:  # also refuses NaN
        raise UsageError(
            f"rate {rate_per_s:g} is not usable: it is requests per second, "
            f"above 0 and at most {MAX_RATE_PER_S:,.0f}"
        )
    if not 0 < duration_s <= MAX_DURATION_S:
        raise UsageError(
            f"duration {duration_s:g} is not usable: it is seconds, "
            f"above 0 and at most {MAX_DURATION_S:,.0f} (a week)"
        )
    if not 0 <= warmup_s <= MAX_DURATION_S:
        raise UsageError(
            f"warm-up {warmup_s:g} is not usable: it is seconds, "
            f"0 or more and at most {MAX_DURATION_S:,.0f} (a week)"
        )
    if rate_per_s * (warmup_s + duration_s) > MAX_REQUESTS:
        raise UsageError(
            f"{rate_per_s:g} requests/s for {warmup_s + duration_s:g} s are more than "
            f"{MAX_REQUESTS:,} requests, the most that one run keeps: shorten it or lower the rate"
        )
