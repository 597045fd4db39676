"""The times between the chunks of a body: between tokens, where a model streams them."""

from __future__ import annotations

from stagescope.middleware.recording.timeline import Timeline
from stagescope.recorder import format as fmt

_pack = fmt.GAPS.pack_into


class ChunkGaps:
    """Made at a body's second chunk with bytes in it, so a reply of one chunk pays nothing.

    A chunk's time is when the server had taken it, as for the first byte: what the client saw,
    and not when the model had the token, where the client is slower than the model.
    """

    __slots__ = ("count", "last_ns", "longest_ns", "sum_ns")

    def __init__(self, first_ns: int) -> None:
        self.last_ns = first_ns
        self.count = self.sum_ns = self.longest_ns = 0

    def chunk(self, at_ns: int) -> None:
        """Note that a chunk was handed over at *at_ns*."""
        gap = at_ns - self.last_ns
        self.last_ns = at_ns
        self.count += 1
        self.sum_ns += gap
        self.longest_ns = max(self.longest_ns, gap)

    def write(self, timeline: Timeline) -> None:
        """Write them into the record, before it is finished."""
        if not timeline.done:
            _pack(timeline.slot.raw, fmt.GAPS_AT, self.count, self.sum_ns, self.longest_ns)
