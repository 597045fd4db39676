"""The governor's judgement: readings of CPU time in, how much to shed out. No clock, no thread."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import Final

SHEDS: Final = ("capture", "micro-capture", "stack-rate", "stacks", "gpm")
"""What goes, in this order: level 1 is without the first, level 2 without the first two. `stack-rate`
halves the rate of stacks, `stacks` ends them."""

WINDOW_S: Final = 30.0
"""CPU is judged over this long, all of it after the last step: so no step is judged by what was
used before it, and no two steps are closer."""
RECOVER_S: Final = 120.0
"""How long it must be calm before a step is taken back."""
MOST_PATIENCE_S: Final = 3600.0
"""A step that is taken back and needed again is next taken back after twice as long, to this."""
CALM: Final = 0.7
"""Below this share of the budget it is calm; between it and the budget nothing changes."""


@dataclass(frozen=True, slots=True)
class Standing:
    """Where the governor stands."""

    level: int = 0
    """How many of `SHEDS` are shed."""
    since_ns: int = 0
    """When the last step was taken, or watching began."""
    calm_since_ns: int | None = None
    patience_s: float = RECOVER_S
    tried: bool = False
    """True where the last step took one back."""


def judge(standing: Standing, share: float | None, now_ns: int, budget: float) -> Standing:
    """Give the next standing: the same, or one step further or back.

    *share* is the CPU used, as a share of one core; None where too little is known yet.
    """
    if share is None:
        return standing
    if share > budget:
        return _further(standing, now_ns)
    if share > CALM * budget:
        return replace(standing, calm_since_ns=None)
    if standing.calm_since_ns is None:
        return replace(standing, calm_since_ns=now_ns)
    if standing.level and now_ns - standing.calm_since_ns >= standing.patience_s * 1e9:
        return _back(standing, now_ns)
    return standing


def _further(standing: Standing, now_ns: int) -> Standing:
    if standing.level == len(SHEDS):
        return replace(standing, calm_since_ns=None)
    patience_s = standing.patience_s
    if standing.tried:  # what was taken back was needed after all
        patience_s = min(2 * patience_s, MOST_PATIENCE_S)
    return Standing(standing.level + 1, now_ns, None, patience_s)


def _back(standing: Standing, now_ns: int) -> Standing:
    # Where the last one held as well, there is no more reason for patience.
    patience_s = RECOVER_S if standing.tried else standing.patience_s
    return Standing(standing.level - 1, now_ns, None, patience_s, tried=True)


class Usage:
    """Readings of a sum of CPU seconds, and their share of one core over the last window."""

    def __init__(self) -> None:
        self._readings: deque[tuple[int, float]] = deque()

    def add(self, at_ns: int, cpu_s: float) -> None:
        """Note that until *at_ns* there were *cpu_s* in all."""
        self._readings.append((at_ns, cpu_s))
        while len(self._readings) > 1 and self._readings[1][0] <= at_ns - WINDOW_S * 1e9:
            self._readings.popleft()

    def share(self, since_ns: int) -> float | None:
        """Give the share of one core in the last window; None until one began after *since_ns*."""
        if not self._readings:
            return None
        (begun_ns, before_s), (now_ns, now_s) = self._readings[0], self._readings[-1]
        if begun_ns < since_ns or now_ns - begun_ns < WINDOW_S * 1e9:
            return None
        return (now_s - before_s) / ((now_ns - begun_ns) / 1e9)
