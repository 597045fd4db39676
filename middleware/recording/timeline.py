"""The timeline of one request or batch: which stage opened and closed when, written in place.

Opening a stage reserves an entry (code, start, end) of the slot, so closing it always finds its
place, whichever thread it comes from. Meaning is made from the entries by the reader; nothing
is computed here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from contextvars import ContextVar
from itertools import count
from struct import Struct
from threading import RLock
from typing import Any

from stagescope.middleware.otel_context import Nesting
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.slots import ENDS, NO_CODES, NO_TIMES, Slot
from stagescope.recorder import format as fmt

current: ContextVar[Timeline | None] = ContextVar("stagescope_timeline", default=None)
"""The timeline of the request that this task or thread works for."""

_chain_lock = RLock()
"""Reentrant, for a signal handler of the app's may open a stage while this thread holds it."""


def _fresh_lock_in_child() -> None:
    """A thread that the fork did not take along may hold the parent's."""
    global _chain_lock
    _chain_lock = RLock()


os.register_at_fork(after_in_child=_fresh_lock_in_child)

NOWHERE = fmt.MAX_CHAIN * fmt.ENTRIES_PER_SLOT
"""An entry that no timeline has: closing or renaming it does nothing."""

# Packing clears what it covers first, so these write the whole slot anew: unused fields, the
# words of the commit and all entries become zero at no further cost.
_OPENED = Struct(f"<16xBxBx{fmt.OPENED.format[5:]}{fmt.SLOT_BYTES - fmt.FINISHED_AT}x")
_pack_opened = _OPENED.pack_into
_pack_words = Struct("<40s92s").pack_into
_WORDS_AT = fmt.GAPS_AT - 132
_pack_finished = Struct(fmt.FINISHED.format.removesuffix("I40s92s")).pack_into


class Timeline:
    """Opens and closes stages; all times are ns of the recorder's clock.

    Safe to use from any thread, also after the request ended: then nothing is written.
    """

    __slots__ = (
        "chain", "claims", "clock", "codes", "done", "dropped", "indices", "lent", "nesting",
        "recorder", "run", "sendings", "slot", "span_id", "start_ns", "times", "trace_id", "waits",
        "watched",
    )  # fmt: skip

    chain: list[Slot] | None
    lent: list[Slot] | None
    nesting: Nesting | None
    claims: object
    """What came from workers (see runtime/workers.py); not set before there is any."""
    sendings: Any
    """The `Sendings` of its response, where that is a stream."""
    waits: int
    """Waits for a thread that got an entry of their own (see hooks/anyio.py)."""
    watched: bool
    """Whether its load run is open here: what costs more than 1 µs is done for such alone."""

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
        self.watched = recorder.runs.has(run, start_ns) if run else False
        self.done = False
        self.dropped = self.waits = 0
        self.chain = self.lent = self.nesting = self.sendings = None
        self.indices = count()
        take_slot = recorder.take_slot
        try:
            slot = self.slot = take_slot()
        except IndexError:
            slot = self.slot = recorder.acquire()
        self.codes = slot.codes
        self.times = slot.times
        raw = slot.raw
        try:
            _pack_opened(
                raw, 0, kind, flags, 0, start_ns, trace_id, span_id, parent_id, run, method, path
            )
        except BaseException:
            raw[17] = 1  # Else it would count as free already.
            recorder.discard(slot)
            raise
        # The state last, so that a process killed in between leaves no half-written identity.
        raw[17] = 1

    def _begin_without_slot(
        self,
        recorder: Recorder,
        clock: Callable[[], int],
        start_ns: int = 0,
        trace_id: bytes = b"",
        span_id: bytes = b"",
        run: bytes = b"",
    ) -> None:
        """Be what `__init__` makes, but for a slot: for a timeline that is kept in another place.

        It has no entry of its own: `stage` finds none in the views, and comes to `spill`.
        """
        self.recorder = recorder
        self.clock = clock
        self.start_ns = start_ns
        self.trace_id = trace_id
        self.span_id = span_id
        self.run = run
        self.watched = self.done = False
        self.dropped = self.waits = 0
        self.chain = self.lent = self.nesting = self.sendings = None
        self.codes = NO_CODES
        self.times = NO_TIMES
        self.indices = count(ENDS)

    def open(self, code: int) -> int:
        """Open a stage now; give the entry that `close` closes."""
        return self.open_at(code, self.clock())

    def close(self, index: int) -> None:
        """Close the stage of entry *index*, now."""
        self.close_at(index, self.clock())

    def open_at(self, code: int, at_ns: int) -> int:
        """Open a stage at *at_ns*; give the entry that closes it."""
        index = next(self.indices)
        try:
            self.codes[index] = code
            self.times[index] = at_ns
        except (IndexError, ValueError):
            self.spill(index, code, at_ns)
        return index

    # A keyword-only parameter would make every call of it slow.
    def close_at(self, index: int, at_ns: int, failed: bool = False) -> None:
        """Close a stage at *at_ns*."""
        if failed:
            self.recode(index, fmt.CODE_FAILED, add=True)
        if index < 32:
            try:
                self.times[index + 32] = at_ns
            except (IndexError, ValueError):
                return  # The timeline ended before, or is a forked parent's.
        else:
            self.spill_end(index, at_ns)

    def recode(self, index: int, code: int, *, add: bool = False) -> None:
        """Say that the stage of entry *index* is another one, from its start on."""
        try:
            if found := self.place(index):
                slot, at = found
                slot.codes[at] = slot.codes[at] | code if add else code
        except ValueError:
            return  # A forked child's view of its parent's timeline: see Recorder.abandon.

    def flag(self, flag: int) -> None:
        """Add a flag (FLAG_INTERNAL, ...) to what was said of this timeline when it began."""
        with suppress(ValueError):  # As in recode.
            if not self.done:
                self.slot.raw[fmt.FLAGS_AT] |= flag

    def reopen(self, index: int, at_ns: int = 0) -> int:
        """Open the closed stage of entry *index* again, from *at_ns* on or as if never closed.

        Return since when it is open; 0 where the timeline ended.
        """
        with suppress(ValueError):  # As in recode.
            if found := self.place(index):
                slot, at = found
                slot.times[at + ENDS] = 0
                if at_ns:
                    slot.times[at] = at_ns
                return slot.times[at]
        return 0

    def _views(self) -> Sequence[tuple[memoryview, memoryview]]:
        """Return codes and times of each slot."""
        if self.chain is None:
            return ((self.codes, self.times),)
        return [(self.codes, self.times), *((slot.codes, slot.times) for slot in self.chain)]

    def _entries(self) -> Iterator[tuple[int, int, int, int]]:
        """Yield index, code, start and end of each entry, also of those that are no stage."""
        with suppress(ValueError):  # As in recode.
            for first, (codes, times) in zip(count(0, ENDS), self._views(), strict=False):
                for at in range(len(codes)):
                    if not codes[at]:
                        return
                    yield first + at, codes[at], times[at], times[at + ENDS]

    def innermost(self, waiting: int) -> int:
        """Return the code of the stage that was opened last and is open still; 0: none is known.

        An entry of the code *waiting* does not count: nothing is done meanwhile.
        """
        try:
            for written, times in reversed(self._views()):
                # Newest first, and not by `_entries`: each call of a model library asks this.
                codes = written.tolist()
                for at in range((codes.index(0) if 0 in codes else len(codes)) - 1, -1, -1):
                    code = codes[at]
                    if not times[at + ENDS] and code < fmt.CODE_SPECIAL and code != waiting:
                        return code & ~fmt.CODE_FAILED
        except ValueError:
            pass  # As in recode.
        return 0

    def before_open(self) -> int:
        """Return a time before the start of every stage that is open; now where none is."""
        starts = [
            start
            for _, code, start, end in self._entries()
            if start and not end and code < fmt.CODE_SPECIAL
        ]
        return min(starts, default=self.clock() + 1) - 1

    def last(self, code: int) -> tuple[int, int]:
        """Return index and end of the last entry of stage *code*; (NOWHERE, 0) where there is none."""
        found = NOWHERE, 0
        for index, written, _, end in self._entries():
            if written == code:
                found = index, end
        return found

    def mark(self, code: int, start: int, end: int) -> None:
        """Add an entry that is no stage."""
        self.close_at(self.open_at(code, start), end)

    def spill(self, index: int, code: int, start: int) -> None:
        """Write an opening beyond the first slot; nowhere when the timeline ended."""
        try:
            if found := self.place(index):
                slot, at = found
                slot.codes[at] = code
                slot.times[at] = start
            elif not self.done:
                if not self.dropped:
                    self.recorder.count("chains_refused")
                self.dropped += 1
        except ValueError:
            return  # As in recode.

    def spill_end(self, index: int, end: int) -> None:
        """Write a closing beyond the first slot; nowhere when the timeline ended."""
        try:
            if found := self.place(index):
                slot, at = found
                slot.times[at + ENDS] = end
        except ValueError:
            return  # As in recode.

    def place(self, index: int) -> tuple[Slot, int] | None:
        """Find slot and position of an entry, chaining a slot where needed; None: nowhere."""
        if self.done or self.recorder.abandoned:
            return None
        chained, at = divmod(index, fmt.ENTRIES_PER_SLOT)
        if chained == 0:
            return self.slot, at
        if chained >= fmt.MAX_CHAIN:
            return None
        with _chain_lock:
            if self.chain is None:
                self.chain = []
            chain = self.chain
            if self.done:
                return None  # Ended by another thread meanwhile; see finish.
            while (position := len(chain) + 1) <= chained:
                self._add_slot(chain, position, position)
        return chain[chained - 1], at

    def _add_slot(self, slots: list[Slot], number: int, position: int) -> Slot | None:
        """Add a slot as the *number*th of *slots*; None where there is one by now."""
        slot = self._chained_slot(position)
        # A signal handler of this thread may have been faster, but does not come between the
        # question and the answer: no call stands between them.
        if not slots[number - 1 :]:
            slots.append(slot)
            return slot
        self.recorder.discard(slot)
        return None

    def _chained_slot(self, position: int) -> Slot:
        slot = self.recorder.acquire()
        try:
            _pack_opened(
                slot.raw, 0, fmt.KIND_CHAIN, 0, position, self.start_ns, self.trace_id,
                self.span_id, b"", b"", b"", b"",
            )  # fmt: skip
        finally:
            slot.raw[fmt.STATE_AT] = fmt.STATE_OPEN
        return slot

    def inject(self) -> int | None:
        """Reserve a slot for another process to write to; give its place in the file.

        None where this timeline has no place in a file, or no slot is free.
        """
        with _chain_lock:
            if self.lent is None:
                self.lent = []
            lent = self.lent
            if self.done or self.recorder.abandoned:
                return None
            number = len(lent) + 1
            slot = self._add_slot(lent, number, fmt.MAX_CHAIN + number - 1)
        return slot.at if slot is not None and slot.listed else None

    def finish(
        self,
        end_ns: int,
        request_bytes: int,
        response_bytes: int,
        first_byte_ns: int,
        send_wait_ns: int,
        chunks: int,
        status: int,
        error: bytes,
        route: bytes,
    ) -> None:
        """End the timeline and commit its record; a second call does nothing.

        For a batch *request_bytes* is its device time and *chunks* its size.
        """
        if self.done:
            return
        self.done = True
        self.codes = NO_CODES
        self.times = NO_TIMES
        recorder, slot, chain = self.recorder, self.slot, self.chain
        further: Sequence[Slot] = ()
        try:
            if chain is not None or self.lent is not None:
                # `done` is set, so no thread adds to these once it waits for the lock.
                with _chain_lock:
                    further = [*(chain or ()), *(self.lent or ())]
            raw = slot.raw
            duration = end_ns - self.start_ns
            if duration < 0:  # noqa: PLR1730 - a call of max() would cost each request
                duration = 0  # A clock that stepped back.
            _pack_finished(
                raw, 240, duration, request_bytes, response_bytes, first_byte_ns,
                send_wait_ns, chunks, self.dropped, status, len(chain) if chain else 0,
            )  # fmt: skip
            if error or route:
                _pack_words(raw, _WORDS_AT, error, route)
            raw[17] = 2
            for each in further:
                recorder.commit(each)
            recorder.commit(slot)
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        """Free its slots without a record, where it could not be finished."""
        self.done = True
        self.codes = NO_CODES
        self.times = NO_TIMES
        for slot in (self.slot, *(self.chain or ()), *(self.lent or ())):
            self.recorder.discard(slot)


# Literals above are those of the format; a name costs a look-up for each request.
assert (fmt.OPENED_AT, fmt.STATE_AT, fmt.FINISHED_AT, ENDS) == (16, 17, 240, 32)
assert _OPENED.size == fmt.SLOT_BYTES
assert (fmt.STATE_FREE, fmt.STATE_OPEN, fmt.STATE_FINISHED) == (0, 1, 2)
