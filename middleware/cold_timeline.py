"""The timeline of a cold start: begun before there is a recorder, moved into its file then."""

from __future__ import annotations

import os
from collections.abc import Callable

from stagescope import recorder_format as fmt
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.slots import Slot
from stagescope.middleware.timeline import Timeline

MOST_CHAINED = 4
"""Slots beyond the first that stages of a cold start may fill: 160 openings in all."""


class ColdTimeline(Timeline):
    """In plain memory until `move` finds it a place in a recorder file."""

    __slots__ = ("in_file",)

    def __init__(self, start_ns: int, clock: Callable[[], int]) -> None:
        scratch = Recorder(
            memoryview(bytearray(fmt.file_bytes(1, 1))),
            in_flight_slots=1,
            ring_slots=1,
            clock=clock,
        )
        scratch.close()
        ids = os.urandom(24)
        super().__init__(scratch, fmt.KIND_COLD_START, start_ns, ids[:16], ids[16:])
        self.in_file = False

    def full(self) -> bool:
        """Tell whether it takes no further stages of the user's."""
        return self.chain is not None and len(self.chain) >= MOST_CHAINED

    def move(self, recorder: Recorder) -> None:
        """Go on in *recorder*'s file; a stage that is open stays open, at its place there."""
        self.in_file = True
        self.recorder = recorder
        chain = self.chain
        if chain is not None:
            chain[:] = [_copied(slot, recorder) for slot in chain]
        old = self.slot
        new = self.slot = _copied(old, recorder)
        self.codes = new.codes
        self.times = new.times
        # What another thread wrote to the old place while we copied.
        new.raw[fmt.ENTRIES_AT :] = old.raw[fmt.ENTRIES_AT :]


def _copied(slot: Slot, recorder: Recorder) -> Slot:
    """Copy *slot* into the file; its state last, as for a timeline that begins."""
    copied = recorder.acquire()
    content = bytearray(slot.raw)
    content[fmt.STATE_AT] = fmt.STATE_FREE
    copied.raw[:] = content
    copied.raw[fmt.STATE_AT] = fmt.STATE_OPEN
    return copied
