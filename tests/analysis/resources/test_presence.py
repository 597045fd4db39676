"""How many requests were in a stage, integrated: against a count nanosecond by nanosecond."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from stagescope.analysis.resources.attribution import ConcurrencyIntegral

STRETCH = st.tuples(st.integers(0, 50), st.integers(0, 50)).map(lambda s: (min(s), max(s)))
STRETCHES = st.lists(STRETCH, min_size=1, max_size=10)
EPOCHS = st.sampled_from([0, 3_000_000_000_000_000_000])
"""A clock at any time of its life: sums of it wrap, differences do not."""


@given(STRETCHES, STRETCHES, EPOCHS, st.integers(1, 3))
def test_is_the_sum_of_every_overlap(
    segments: list[tuple[int, int]], stretches: list[tuple[int, int]], epoch: int, chunk: int
) -> None:
    """In each stretch it is the sum of what every segment overlaps of it, in chunks or at once."""
    starts, ends = (np.array([s[i] for s in segments], np.int64) + epoch for i in (0, 1))
    begin, end = (np.array([s[i] for s in stretches], np.int64) + epoch for i in (0, 1))
    presence = ConcurrencyIntegral(np.unique(np.concatenate([begin, end])))
    for at in range(0, len(segments), chunk):
        presence.add("s", starts[at : at + chunk], ends[at : at + chunk])

    assert presence.between("s", begin, end).tolist() == [
        sum(max(0, min(b, d) - max(a, c)) for a, b in segments) for c, d in stretches
    ]
