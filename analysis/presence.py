"""How many requests were in each stage, integrated over time: exact, in bounded memory."""

from __future__ import annotations

import numpy as np

from stagescope.analysis.charged import Ints


def integral(starts_ns: Ints, ends_ns: Ints, at_ns: Ints) -> Ints:
    """Give, at each of *at_ns*, the request-nanoseconds so far of segments `[start, end)`.

    The number of segments that hold a moment is piecewise constant, so its integral is piecewise
    linear and exact in whole nanoseconds: a start adds `t - start`, an end takes `t - end` away.
    """
    return _ramp(np.sort(starts_ns), at_ns) - _ramp(np.sort(ends_ns), at_ns)


def _ramp(edges: Ints, at_ns: Ints) -> Ints:
    """Give the sum over *edges* of `max(0, t - edge)` for each t.

    A sum may pass 2**63 and wrap; the difference of two of them, which is small, is right again.
    """
    passed = np.searchsorted(edges, at_ns, side="right")
    before = np.concatenate([np.zeros(1, np.int64), np.cumsum(edges, dtype=np.int64)])
    ramp: Ints = passed * at_ns - before[passed]
    return ramp


class Presence:
    """Request-nanoseconds by stage up to each moment of a grid; fed chunk by chunk."""

    def __init__(self, at_ns: Ints) -> None:
        """*at_ns* is the grid: sorted moments, each once."""
        self.at_ns = at_ns
        self._sums: dict[str, Ints] = {}

    def add(self, stage: str, starts_ns: Ints, ends_ns: Ints) -> None:
        """Take up segments of *stage*."""
        found = integral(starts_ns, ends_ns, self.at_ns)
        before = self._sums.get(stage)
        self._sums[stage] = found if before is None else before + found

    def stages(self) -> tuple[str, ...]:
        """Give the stages that were taken up."""
        return tuple(self._sums)

    def between(self, stage: str, starts_ns: Ints, ends_ns: Ints) -> Ints:
        """Give the request-nanoseconds of *stage* in each stretch; its ends are of the grid."""
        sums = self._sums[stage]
        first, last = (np.searchsorted(self.at_ns, edge) for edge in (starts_ns, ends_ns))
        return sums[last] - sums[first]
