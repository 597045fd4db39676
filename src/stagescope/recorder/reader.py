"""Reads a recorder file while its process writes it, and after that process is gone.

By `pread` and never by a mapping: whoever may write the file may cut it off at any moment, and
touching a mapped page that is gone ends the process (SIGBUS). A read only comes back short.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from stagescope.errors import RecorderFileError
from stagescope.recorder import format as fmt
from stagescope.recorder.decoder import Chains, SlotDecoder
from stagescope.recorder.header import bad_file, check_header, padded_text
from stagescope.recorder.spool import still_named, try_lock
from stagescope.records import (
    SENT_BEFORE_NS,
    Anchor,
    InstrumentCost,
    Process,
    Record,
    RequestRecord,
    with_stalls,
)

HOLE_PATIENCE_NS = 1_000_000_000
"""How long a slot may stay reserved and unwritten, with later ones written, before it is skipped.

Only a thread that was stopped between two instructions for that long leaves such a hole.
"""
_FEWEST_AHEAD, _MOST_AHEAD = 4, 64
"""Slots read at once: few where little is written, more while there is more."""
_BLOCK_SLOTS = 256
_MOST_COUNTED = 1 << 61
"""A counter beyond this is damage: no process counts so far."""


class RecorderReader:
    """Follows one recorder file; closed by `close()` or a `with` block.

    Raises RecorderFileError, which names file, offset and cause, for a file that is foreign,
    truncated, damaged or newer than this reader.
    """

    def __init__(
        self,
        path: Path,
        *,
        next_seq: int = 0,
        chains_from: int | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self.path = path
        self.next_seq = next_seq
        """The next record to read; save it to go on after a restart."""
        self.overwritten = 0
        """Records that were written over before they could be read."""
        self.lost = 0
        """Slots that were reserved but never written whole."""
        self._clock = clock
        self._hole_since_ns = 0
        try:
            # Not blocking: a pipe of that name would never open.
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW
            self._fd = os.open(path, flags)
        except OSError as problem:
            if problem.errno == errno.ELOOP:
                raise bad_file(path, 0, "it is a symbolic link") from None
            raise
        try:
            self._read_header(path)
            self._recall_chains(next_seq if chains_from is None else chains_from)
        except BaseException:
            os.close(self._fd)
            raise

    def _read_header(self, path: Path) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise bad_file(path, 0, "it is no regular file")
        header = os.pread(self._fd, fmt.NAMES_AT, 0)
        fields = check_header(path, header, status.st_size)
        (
            _,
            _,
            _,
            self._data_at,
            self._slot_bytes,
            self._in_flight,
            self._ring,
            names,
            self._size,
        ) = fields[:9]
        self._fields: tuple[Any, ...] = fields
        self._live = header
        self._ring_at = self._data_at + self._in_flight * self._slot_bytes
        self._ahead: deque[bytes] = deque()
        """Slots that were read whole and are next: those of `next_seq` and after."""
        self._many_ahead = _FEWEST_AHEAD
        self._chains = Chains()
        self._decoder = SlotDecoder(self._read, names)

    def _read(self, at: int, size: int) -> bytes:
        """Read a part of the file; raises RecorderFileError where it is no longer there."""
        data = os.pread(self._fd, size, at)
        if len(data) < size:
            end = at + len(data)
            raise bad_file(
                self.path, end, f"it was cut off while it was read, from {self._size} bytes"
            )
        return data

    def _read_word(self, at: int) -> int:
        return int.from_bytes(self._read(at, 8), "little")

    def _word(self, index: int) -> int:
        """Return a word of the header as it is now; as it was last read where the file is cut."""
        header = os.pread(self._fd, fmt.NAMES_AT, 0)
        if len(header) == fmt.NAMES_AT:
            self._live = header
        return self._known_word(index)

    def _known_word(self, index: int) -> int:
        return int.from_bytes(self._live[index * 8 : index * 8 + 8], "little")

    def _counted(self, index: int) -> int:
        value = self._known_word(index)
        return value if value < _MOST_COUNTED else 0

    def _place(self, seq: int) -> int:
        at: int = self._ring_at + seq % self._ring * self._slot_bytes
        return at

    def _blocks(self, at: int, slots: int) -> Iterator[bytes]:
        """Read *slots* slots from *at* on, some at a time."""
        for first in range(0, slots, _BLOCK_SLOTS):
            many = min(_BLOCK_SLOTS, slots - first)
            yield self._read(at + first * self._slot_bytes, many * self._slot_bytes)

    def _recall_chains(self, chains_from: int) -> None:
        """Take up again the parts of timelines that an earlier reader had seen and not finished."""
        for seq in range(max(chains_from, self.next_seq - self._ring), self.next_seq):
            slot = self._read(self._place(seq), self._slot_bytes)
            again = self._read(self._place(seq), self._slot_bytes)
            if int.from_bytes(slot[:8], "little") == seq + 1 and slot == again:
                self._chains.take(slot, seq)

    @property
    def chains_from(self) -> int:
        """The earliest slot that a reader which goes on at `next_seq` must know; save it too."""
        oldest: int = self.next_seq - self._ring
        return max(self._chains.first_seq(self.next_seq), oldest)

    def close(self) -> None:
        """Close the file; nothing is deleted."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def process(self) -> Process:
        """The process that writes, with its newest clock anchor."""
        pid, ring_id, boot, host, service, version, python = (
            self._fields[9],
            *self._fields[11:],
        )
        pair = fmt.ANCHOR_WORDS + 2 * ((self._word(fmt.ANCHOR_COUNT_WORD) - 1) % 2)
        word = self._known_word
        return Process(
            ring_id=ring_id.hex(),
            pid=pid,
            service=padded_text(service),
            host=padded_text(host),
            boot_id=padded_text(boot),
            anchor=Anchor(word(pair), word(pair + 1)),
            cost=InstrumentCost(
                self._counted(fmt.COST_BASE_WORD), self._counted(fmt.COST_STAGE_WORD)
            ),
            version=padded_text(version),
            python=padded_text(python),
        )

    def counters(self) -> dict[str, int]:
        """Return the writer's counters and ours: refused, dropped, overwritten, lost, damaged."""
        own = {
            "overwritten": self.overwritten,
            "lost": self.lost,
            "damaged": self._decoder.damaged,
        }
        return self._words_from(fmt.COUNTER_WORDS, fmt.COUNTERS) | own

    def waits(self) -> dict[str, int]:
        """Return the process's own waits (`recorder.format.WAITS`): loop lag, thread pool, GC."""
        return self._words_from(fmt.WAIT_WORDS, fmt.WAITS)

    def _words_from(self, first: int, names: tuple[str, ...]) -> dict[str, int]:
        self._word(first)
        return {name: self._counted(first + i) for i, name in enumerate(names)}

    def wait(self, name: str) -> int:
        """Return one figure of `waits`."""
        self._word(fmt.WAIT_WORDS)
        return self._counted(fmt.WAIT_WORDS + fmt.WAITS.index(name))

    def writer_alive(self) -> bool:
        """Return whether the process still holds the file; killed processes do not."""
        if not try_lock(self._fd, shared=True):
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def still_there(self) -> bool:
        """Return whether the file still has its name: nobody deleted or replaced it."""
        return still_named(self._fd, self.path)

    def poll(self, limit: int = 4096) -> list[Record]:
        """Read up to *limit* records that were committed since the last call, in order.

        Raises RecorderFileError where the file was cut off since it was opened.
        """
        if (size := os.fstat(self._fd).st_size) < self._size:
            raise bad_file(
                self.path, size, f"it was cut off while it was read, from {self._size} bytes"
            )
        process = self.process
        found: list[Record] = []
        while len(found) < limit:
            slot = self._next_slot()
            if slot is None:
                break
            record = self._decoder.decode(slot, process, self.next_seq, self._chains)
            self.next_seq += 1
            if record is not None:
                found.append(record)
        return self._stalled(found)

    def _stalled(self, records: list[Record]) -> list[Record]:
        """Lay the stalls read so far over the requests among *records*, which were read last."""
        known = self._decoder.stalls
        if not known:
            return records
        first_ns = min([r.start_ns for r in records], default=0)
        last_ns = max([r.start_ns + r.duration_ns for r in records], default=0)
        since_ns = first_ns - SENT_BEFORE_NS
        stalls = [stall for stall in known if stall.end_ns > since_ns and stall.start_ns < last_ns]
        if not stalls:
            return records
        return [with_stalls(r, stalls) if isinstance(r, RequestRecord) else r for r in records]

    def _next_slot(self) -> bytes | None:
        """Copy the slot of `next_seq`; None where it is not written yet."""
        margin = 0
        while True:
            if self._ahead or self._read_ahead():
                self._hole_since_ns = 0
                return self._ahead.popleft()
            begin = self._read_word(self._place(self.next_seq))
            if begin == self.next_seq + 1:
                continue  # Written since we looked.
            if begin > self.next_seq + 1 and (begin - 1 - self.next_seq) % self._ring == 0:
                self._skip_overwritten(margin)
                # The writer goes on while we look: keep further ahead of it each time.
                margin = min(2 * margin + 16, self._ring // 2)
            elif not self._skip_hole():
                return None

    def _read_ahead(self) -> int:
        """Copy the next slots that are written whole; give how many.

        Read twice: the first time tells that a slot was committed before the second began, and
        that both are the same tells that the writer, which sets the begin word to 0 first, did
        not come round meanwhile.
        """
        at, size = self._place(self.next_seq), self._slot_bytes
        many = min(self._many_ahead, self._ring - self.next_seq % self._ring)
        block = self._read(at, many * size)
        begins = memoryview(block).cast("Q")[:: size >> 3]
        whole = 0
        while whole < many and begins[whole] == self.next_seq + whole + 1:
            whole += 1
        if whole:
            again = self._read(at, whole * size)
            for place in range(0, whole * size, size):
                slot = block[place : place + size]
                if slot != again[place : place + size]:
                    break
                self._ahead.append(slot)
        read = len(self._ahead)
        self._many_ahead = min(2 * many, _MOST_AHEAD) if read == many else _FEWEST_AHEAD
        return read

    def _skip_overwritten(self, margin: int) -> None:
        """Go to the oldest record that is still there, or *margin* records beyond it."""
        there = [begin for begin in self._begins() if begin > self.next_seq]
        if not there:
            return  # The only slot in question is just being written; look again.
        oldest = min(max(min(there) - 1, max(there) - self._ring + margin), max(there) - 1)
        self.overwritten += oldest - self.next_seq
        self.next_seq = oldest

    def _skip_hole(self) -> bool:
        """Step over a slot that will never be written; False where there is reason to wait."""
        ahead = [begin for begin in self._begins(64) if begin > self.next_seq + 1]
        if not ahead:
            self._hole_since_ns = 0
            return False
        now = self._clock()
        self._hole_since_ns = self._hole_since_ns or now
        if now - self._hole_since_ns < HOLE_PATIENCE_NS and self.writer_alive():
            return False
        self._hole_since_ns = 0
        self.lost += 1
        self.next_seq += 1
        return True

    def _begins(self, count: int | None = None) -> list[int]:
        """Return the begin words of the next *count* slots (of all slots where None).

        A word that does not belong to the place where it stands is damage, and left out.
        """
        first, ring, step = self.next_seq, self._ring, self._slot_bytes >> 3
        left = ring if count is None else min(count, ring)
        found: list[int] = []
        while left:
            many = min(left, _BLOCK_SLOTS, ring - first % ring)
            block = self._read(self._place(first), many * self._slot_bytes)
            seen = memoryview(block).cast("Q")[::step].tolist()
            found += [
                begin
                for place, begin in enumerate(seen, first + 1)
                if begin and (begin - place) % ring == 0
            ]
            first += many
            left -= many
        return found

    def requests_in_flight(self) -> int:
        """Count the requests that are being served now; 0 where the file was cut off."""
        return len(self.serving_since())

    def serving_since(self) -> list[int]:
        """Return the starts (monotonic ns) of the requests that are being served now."""
        starts: list[int] = []
        open_request = bytes((fmt.KIND_REQUEST, fmt.STATE_OPEN))
        with suppress(RecorderFileError):  # Said by `poll`.
            for block in self._blocks(self._data_at, self._in_flight):
                for at in range(fmt.OPENED_AT, len(block), self._slot_bytes):
                    if block[at : at + 2] == open_request:
                        starts.append(int.from_bytes(block[at + 8 : at + 16], "little"))
        return starts

    def in_flight(self, now_ns: int) -> list[Record]:
        """Return what was begun and not finished, as records in the state `died`.

        For a process that is gone: call it after `poll` has returned everything.
        *now_ns* (monotonic) is taken as the end of what was still open: the moment at which
        the death was noticed is all that can be known.
        A request that was finished, but whose commit was cut off, comes as finished.
        """
        chains = self._chains
        heads: list[bytes] = []
        for block in self._blocks(self._data_at, self._in_flight):
            for at in range(0, len(block), self._slot_bytes):
                slot = block[at : at + self._slot_bytes]
                if slot[fmt.STATE_AT] == fmt.STATE_FREE or self._committed(slot):
                    continue
                if not chains.take(slot):
                    heads.append(slot)
        process = self.process
        records = (self._decoder.decode(s, process, -1, chains, now_ns=now_ns) for s in heads)
        return self._stalled([record for record in records if record is not None])

    def _committed(self, slot: bytes) -> bool:
        word = fmt.COMMIT_WORD * 8
        commit = int.from_bytes(slot[word : word + 8], "little")
        return bool(commit) and self._read_word(self._place(commit - 1)) >= commit
