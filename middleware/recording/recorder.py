"""Writes the recorder file: in-flight slots in place, finished ones copied to the ring.

No lock, no system call and no allocation that grows: the free slots are a deque, positions are
handed out by iterators written in C; both are atomic in CPython.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable
from itertools import count, cycle
from pathlib import Path
from random import Random
from weakref import WeakSet

from stagescope.middleware.recording import guard, names
from stagescope.middleware.recording.open_runs import OpenRuns
from stagescope.middleware.recording.slots import Slot
from stagescope.recorder import format as fmt

REANCHOR_NS = 60_000_000_000
UPKEEP_NS = 1_000_000_000

_WAIT_WORD = {name: fmt.WAIT_WORDS + index for index, name in enumerate(fmt.WAITS)}

live: WeakSet[Recorder] = WeakSet()
"""Recorders of this process; a forked child abandons them."""


class Recorder:
    """Writes timelines into *buffer* (a recorder file's memory, its header already in place).

    *clock* is monotonic and *wall* Unix time, both in ns; *random* makes ids.
    """

    def __init__(
        self,
        buffer: memoryview,
        *,
        in_flight_slots: int = fmt.IN_FLIGHT_SLOTS,
        ring_slots: int = fmt.RING_SLOTS,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], int] = time.time_ns,
        random: Random | None = None,
        path: Path | None = None,
        fd: int = -1,
    ) -> None:
        self.clock = clock
        self.closed = self.abandoned = False
        self.path = path
        """The file behind *buffer*, where there is one: other processes write to it by its name."""
        self.runs = OpenRuns(path and path.parent)
        self._fd = fd
        # Never the global generator: an app that seeds it would repeat our ids in each worker.
        self.random_bits = (random or Random()).getrandbits
        self.wall = wall
        self._bytes = buffer
        self._words = buffer.cast("Q")
        first = (fmt.DATA_AT + in_flight_slots * fmt.SLOT_BYTES) >> 3
        places = range(first, first + ring_slots * 128, 128)
        self._next_place = zip(count(1), cycle(places)).__next__
        """Each seq + 1 with the word at which its place in the ring begins."""
        self._slots = [
            Slot(buffer, fmt.DATA_AT + index * fmt.SLOT_BYTES) for index in range(in_flight_slots)
        ]
        free = deque(self._slots)
        self.take_slot, self._free_slot = free.popleft, free.append
        """The first raises IndexError when all slots are taken; then `acquire` helps."""
        self._copy_names()
        self.anchor(now_ns := clock())
        self.upkeep_due_ns = now_ns + UPKEEP_NS
        live.add(self)
        guard.recorders.add(self)

    def acquire(self) -> Slot:
        """Return a slot for a new timeline, not cleared; one outside the file when all are taken.

        The slot that has been free the longest comes first, so a late write by a thread that
        still holds a finished timeline does not meet a new one.
        """
        try:
            return self.take_slot()
        except IndexError:
            self.count("unlisted")
            return Slot(memoryview(bytearray(fmt.SLOT_BYTES)), 0, listed=False)

    def commit(self, slot: Slot) -> None:
        """Copy a finished *slot* to the ring and free it.

        Killed at any point between, a reader finds the record exactly once: in the ring if its
        begin word is there, else in flight as finished.
        """
        next_place = (
            self._next_place
        )  # In a local: a call of an attribute looks for a method first.
        seq, at = next_place()
        words, slot_words = self._words, slot.words
        slot_words[1] = seq
        words[at] = 0
        words[at : at + 128] = slot_words
        words[at] = seq
        if slot.listed:
            slot.raw[17] = 0
            free = self._free_slot
            free(slot)

    def upkeep(self, now_ns: int) -> None:
        """Do what the request that finds it due does once a second: look whether the file is there.

        Closed where it was deleted: `process_recorder` makes a new one. Abandoned where it was cut
        off, for touching what is gone would end the process (SIGBUS).
        """
        self.upkeep_due_ns = now_ns + UPKEEP_NS
        if self._fd >= 0:
            found = os.fstat(self._fd)
            if found.st_size < (size := len(self._bytes)):
                self.abandon()
                # Until the next recorder is opened, requests are written where nobody reads them.
                self._bytes = memoryview(bytearray(size))
                self._words = self._bytes.cast("Q")
                self.take_slot = deque[Slot]().popleft
                self._fd = -1
            if not found.st_nlink:
                self.close()
        if now_ns >= self._anchor_due_ns:
            self.anchor(now_ns)

    def discard(self, slot: Slot) -> None:
        """Free *slot* without a record; nothing where it is free already."""
        if slot.listed and slot.raw[fmt.STATE_AT] != fmt.STATE_FREE:
            slot.raw[fmt.STATE_AT] = fmt.STATE_FREE
            self._free_slot(slot)

    def anchor(self, now_ns: int) -> None:
        """Write a new (monotonic, wall) pair, due once a minute."""
        self._anchor_due_ns = now_ns + REANCHOR_NS
        done = self._words[fmt.ANCHOR_COUNT_WORD]
        pair = fmt.ANCHOR_WORDS + 2 * (done % 2)
        self._words[pair] = self.clock()
        self._words[pair + 1] = self.wall()
        self._words[fmt.ANCHOR_COUNT_WORD] = done + 1

    def count(self, counter: str) -> None:
        """Add one to a counter of the file's header (see COUNTERS in recorder/format.py)."""
        self._words[fmt.COUNTER_WORDS + fmt.COUNTERS.index(counter)] += 1

    def add_wait(self, name: str, value: int) -> None:
        """Add to one of the process's waits (see WAITS in recorder/format.py)."""
        self._words[_WAIT_WORD[name]] += value

    def raise_wait(self, name: str, value: int) -> None:
        """Make one of the process's waits *value* if it is less."""
        self._words[_WAIT_WORD[name]] = max(self._words[_WAIT_WORD[name]], value)

    def set_wait(self, name: str, value: int) -> None:
        """Make one of the process's waits *value*."""
        self._words[_WAIT_WORD[name]] = value

    def write_cost(self, base_ns: int, stage_ns: int) -> None:
        """Tell what a request and a stage cost in this process."""
        self._words[fmt.COST_BASE_WORD] = base_ns
        self._words[fmt.COST_STAGE_WORD] = stage_ns

    def write_name(self, code: int, encoded: bytes) -> None:
        """Put a stage name into the file's table; its length last, so a reader sees it whole."""
        at = fmt.NAMES_AT + (code - 1) * fmt.NAME_BYTES
        self._bytes[at + 1 : at + 1 + len(encoded)] = encoded
        self._bytes[at] = len(encoded)

    def read_name(self, code: int) -> str:
        """Return the stage name of *code* in the file's table; empty where there is none."""
        at = fmt.NAMES_AT + (code - 1) * fmt.NAME_BYTES
        return bytes(self._bytes[at + 1 : at + 1 + self._bytes[at]]).decode("utf-8", "replace")

    def count_refused_name(self) -> None:
        """Count one stage name that was not taken."""
        self.count("names_refused")

    def _copy_names(self) -> None:
        with names.lock:  # A name made meanwhile would reach neither the copy nor the table.
            names.tables.add(self)
            for name, code in list(names.CODES.items()):
                self.write_name(code, names.encode(name))

    def close(self) -> None:
        """Take no new timelines; those in flight still end in the file.

        The file stays: an agent reads it to its end and deletes it.
        """
        self.closed = True
        live.discard(self)
        guard.recorders.discard(self)
        names.tables.discard(self)

    def abandon(self) -> None:
        """Cut every view: the file and its timelines are a forked parent's, or were cut off.

        A timeline that is still in flight raises ValueError on writing, which its writers
        take for "write nowhere".
        """
        self.close()
        self.abandoned = True
        for slot in self._slots:
            slot.release()
        self._words.release()
        self._bytes.release()


# Literals above are those of the format; a name costs a look-up for each request.
assert (fmt.SLOT_WORDS, fmt.COMMIT_WORD, fmt.STATE_AT, fmt.STATE_FREE) == (128, 1, 17, 0)
