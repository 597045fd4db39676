"""One slot of a recorder file, as views that the hot path indexes."""

from __future__ import annotations

from stagescope.recorder import format as fmt

ENDS = fmt.ENTRIES_PER_SLOT
"""`times[i]` is the start of entry i, `times[i + ENDS]` its end."""


class Slot:
    """Views of the same 1024 bytes: *raw* bytes, all *words*, the entries' *codes* and *times*."""

    __slots__ = ("at", "codes", "listed", "raw", "times", "words")

    def __init__(self, buffer: memoryview, at: int, *, listed: bool = True) -> None:
        self.raw = buffer[at : at + fmt.SLOT_BYTES]
        self.words = self.raw.cast("Q")
        self.codes = self.raw[fmt.CODES_AT : fmt.STARTS_AT].cast("H")
        self.times = self.raw[fmt.STARTS_AT :].cast("Q")
        self.at = at
        """Byte offset in the file."""
        self.listed = listed
        """False for a slot outside the file: it is committed, but not seen while in flight."""

    def release(self) -> None:
        """Make every later use of the views raise ValueError."""
        for view in (self.codes, self.times, self.words, self.raw):
            view.release()


NO_CODES = memoryview(bytearray(0)).cast("H")
NO_TIMES = memoryview(bytearray(0)).cast("Q")
"""The views of a finished timeline: every index is out of range, so late writers notice."""
