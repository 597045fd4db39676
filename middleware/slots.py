"""One slot of a recorder file, as views that the hot path indexes."""

from __future__ import annotations

from stagescope import recorder_format as fmt


class Slot:
    """Views of the same 1024 bytes: *raw* bytes, all *words*, and the *cells* of the entries."""

    __slots__ = ("cells", "listed", "raw", "words")

    def __init__(self, buffer: memoryview, at: int, *, listed: bool = True) -> None:
        self.raw = buffer[at : at + fmt.SLOT_BYTES]
        self.words = self.raw.cast("Q")
        self.cells = self.words[fmt.ENTRIES_AT >> 3 :]
        self.listed = listed
        """False for a slot outside the file: it is committed, but not seen while in flight."""

    def release(self) -> None:
        """Make every later use of the views raise ValueError."""
        self.cells.release()
        self.words.release()
        self.raw.release()


NO_CELLS = memoryview(bytearray(0)).cast("Q")
"""The cells of a finished timeline: every index is out of range, so late writers notice."""
