"""When exactly each stage was charged: a request's timeline as segments, many requests at once.

The partition rule of `stagescope.stages.partition`, in NumPy: there it gives sums, here stretches.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

_MAX_CELLS = 4_000_000
"""Comparisons at a time: what bounds the memory of timelines with nested stages."""


@dataclass(frozen=True, slots=True)
class Openings:
    """Openings of stages, request after request, each request's in the order of its list."""

    counts: Ints
    """How many openings each request has."""
    start_ns: Ints
    end_ns: Ints
    self_ns: Ints
    """What the partition charges to each opening."""


@dataclass(frozen=True, slots=True)
class Segments:
    """Stretches of time, and the opening (by its index) that each is charged to."""

    start_ns: Ints
    end_ns: Ints
    opening: Ints


def charged(openings: Openings) -> Segments:
    """Give the segments of *openings*: of each opening they last its `self_ns` together.

    Times are of one clock. A request in which no stage was opened inside another is ready as
    it stands; only the others are swept.
    """
    length = np.maximum(openings.end_ns - openings.start_ns, 0)
    request = np.repeat(np.arange(len(openings.counts)), openings.counts)
    nested = np.zeros(len(openings.counts), np.bool_)
    nested[request[openings.self_ns != length]] = True
    (plain,) = np.nonzero(~nested[request] & (length > 0))
    found = [Segments(openings.start_ns[plain], openings.end_ns[plain], plain)]
    first = np.cumsum(openings.counts) - openings.counts
    for width in np.unique(openings.counts[nested]):
        (rows,) = np.nonzero(nested & (openings.counts == width))
        step = max(1, _MAX_CELLS // int(2 * width * width))
        for begin in range(0, len(rows), step):
            index = first[rows[begin : begin + step], None] + np.arange(width)
            found.append(_swept(openings, index))
    return Segments(
        *(
            np.concatenate([getattr(part, name) for part in found])
            for name in ("start_ns", "end_ns", "opening")
        )
    )


def _swept(openings: Openings, index: Ints) -> Segments:
    """Sweep requests with equally many openings; *index* is (request, opening)."""
    starts, ends = openings.start_ns[index], openings.end_ns[index]
    # Of those open, the one opened last is charged: by time, then by place in the list.
    order = np.argsort(starts, axis=1, kind="stable")
    starts, ends, index = (np.take_along_axis(a, order, 1) for a in (starts, ends, index))
    edges = np.sort(np.concatenate([starts, ends], axis=1), axis=1)
    begin, end = edges[:, :-1], edges[:, 1:]
    is_open: Bools = (starts[:, None, :] <= begin[:, :, None]) & (
        ends[:, None, :] > begin[:, :, None]
    )
    last = starts.shape[1] - 1 - np.argmax(is_open[:, :, ::-1], axis=2)
    kept = is_open.any(axis=2) & (end > begin)
    return Segments(begin[kept], end[kept], np.take_along_axis(index, last, 1)[kept])
