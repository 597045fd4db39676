"""The timeline of one request or batch: which stage opened and closed when, written in place.

A stage's opening is one pair of words in the slot: (start << 16 | code), (end << 16 | flags).
The pair is reserved by the opening, so a closing always finds its place, whichever thread it
comes from. Meaning is made from the pairs by the reader; nothing is computed here.
"""

from __future__ import annotations

from contextvars import ContextVar
from itertools import count
from threading import Lock

from stagescope import recorder_format as fmt
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.slots import NO_CELLS, Slot

CELLS = fmt.ENTRIES_PER_SLOT * 2

current: ContextVar[Timeline | None] = ContextVar("stagescope_timeline", default=None)
"""The timeline of the request that this task or thread works for."""

_chain_lock = Lock()


class Timeline:
    """Opens and closes stages; all times are ns of the recorder's clock.

    Safe to use from any thread, also after the request ended: then nothing is written.
    """

    __slots__ = (
        "cells", "chain", "clock", "done", "dropped", "next_word", "recorder", "run", "slot",
        "span_id", "start_ns", "trace_id",
    )  # fmt: skip

    def __init__(
        self,
        recorder: Recorder,
        kind: int,
        start_ns: int,
        trace_id: bytes,
        span_id: bytes,
        parent_id: bytes = b"",
        run: bytes = b"",
        method: bytes = b"",
        path: bytes = b"",
        flags: int = fmt.FLAG_SAMPLED,
    ) -> None:
        self.recorder = recorder
        self.clock = recorder.clock
        self.start_ns = start_ns
        self.trace_id = trace_id
        self.span_id = span_id
        self.run = run
        self.done = False
        self.dropped = 0
        self.chain: list[Slot] | None = None
        self.next_word = count(0, 2).__next__
        slot = self.slot = recorder.acquire()
        self.cells = slot.cells
        fmt.OPENED.pack_into(
            slot.raw, fmt.OPENED_AT, kind, fmt.STATE_FREE, flags, 0, 0, start_ns, trace_id,
            span_id, parent_id, run, method, path,
        )  # fmt: skip
        # Last, so that a process killed in between leaves no half-written identity.
        slot.raw[fmt.STATE_AT] = fmt.STATE_OPEN

    def open(self, code: int) -> int:
        """Open a stage now; give the word that closes it."""
        return self.open_at(code, self.clock())

    def close(self, word: int, flags: int = fmt.CLOSED) -> None:
        """Close the stage that `open` gave *word* for, now."""
        self.close_at(word, self.clock(), flags)

    def open_at(self, code: int, at_ns: int) -> int:
        """Open a stage at *at_ns*, not before the timeline's start."""
        word = self.next_word()
        self.put(word, max(0, at_ns - self.start_ns) << fmt.CODE_BITS | code)
        return word

    def close_at(self, word: int, at_ns: int, flags: int = fmt.CLOSED) -> None:
        """Close a stage at *at_ns*."""
        self.put(word + 1, max(0, at_ns - self.start_ns) << fmt.CODE_BITS | flags)

    def recode(self, word: int, code: int) -> None:
        """Say that the open stage of *word* is another one, from its start on."""
        place = self.place(word)
        if place is not None:
            cells, at = place
            cells[at] = cells[at] & ~fmt.CODE_MASK | code

    def mark(self, code: int, value: int) -> None:
        """Add an entry that is no stage: *code* at the present time, with *value*."""
        word = self.next_word()
        self.put(word, max(0, self.clock() - self.start_ns) << fmt.CODE_BITS | code)
        self.put(word + 1, value)

    def put(self, word: int, value: int) -> None:
        """Write *value*; nowhere when the timeline ended or has no room left."""
        try:
            self.cells[word] = value
        except (IndexError, ValueError):
            self.spill(word, value)

    def spill(self, word: int, value: int) -> None:
        """Write beyond the first slot, or count why that cannot be."""
        try:
            place = self.place(word)
            if place is not None:
                cells, at = place
                cells[at] = value
        except ValueError:
            # The views were released: a forked child holds its parent's timeline.
            return

    def place(self, word: int) -> tuple[memoryview, int] | None:
        """Find cells and index of *word*, chaining a slot where needed; None: write nowhere."""
        if self.done:
            return None
        index, at = divmod(word, CELLS)
        if index == 0:
            return self.cells, at
        with _chain_lock:
            chain = self.chain = self.chain or []
            while len(chain) < index:
                if index >= fmt.MAX_CHAIN:
                    self.dropped += 1 - word % 2
                    return None
                chain.append(self._chained_slot(len(chain) + 1))
        return chain[index - 1].cells, at

    def _chained_slot(self, index: int) -> Slot:
        slot = self.recorder.acquire()
        fmt.OPENED.pack_into(
            slot.raw, fmt.OPENED_AT, fmt.KIND_CHAIN, fmt.STATE_OPEN, 0, 0, index, self.start_ns,
            self.trace_id, self.span_id, b"", b"", b"", b"",
        )  # fmt: skip
        return slot

    def finish(
        self,
        end_ns: int,
        *numbers: int,
        chunks: int = 0,
        status: int = 0,
        error: bytes = b"",
        route: bytes = b"",
    ) -> None:
        """End the timeline and commit its record; a second call does nothing.

        *numbers* are the four of recorder_format.FINISHED after the duration.
        """
        if self.done:
            return
        self.done = True
        self.cells = NO_CELLS
        recorder, slot = self.recorder, self.slot
        if self.chain is not None:
            for chained in self.chain:
                recorder.commit(chained)
        fmt.FINISHED.pack_into(
            slot.raw, fmt.FINISHED_AT, end_ns - self.start_ns, *numbers, chunks, self.dropped,
            status, 0, 0, error, route,
        )  # fmt: skip
        slot.raw[fmt.STATE_AT] = fmt.STATE_FINISHED
        recorder.commit(slot)
