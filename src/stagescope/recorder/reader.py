"""Reads a recorder file while its process writes it, and after that process is gone."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from stagescope.errors import RecorderFileError
from stagescope.recorder import format as fmt
from stagescope.recorder.decoder import Chains, SlotDecoder
from stagescope.recorder.spool import try_lock
from stagescope.records import Anchor, InstrumentCost, Process, Record, RequestRecord
from stagescope.stages import Stall, overlap

HOLE_PATIENCE_NS = 1_000_000_000
"""How long a slot may stay reserved and unwritten, with later ones written, before it is skipped.

Only a thread that was stopped between two instructions for that long leaves such a hole.
"""


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
        # Not blocking: a pipe of that name would never open.
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            self._map(path)
            self._recall_chains(next_seq if chains_from is None else chains_from)
        except BaseException:
            os.close(self._fd)
            raise

    def _map(self, path: Path) -> None:
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode):
            raise _bad(path, 0, "it is no regular file")
        size = status.st_size
        header = os.pread(self._fd, fmt.NAMES_AT, 0)
        fields = check_header(path, header, size)
        (_, _, _, self._data_at, self._slot_bytes, self._in_flight, self._ring, self._names) = (
            fields[:8]
        )
        self._fields: tuple[Any, ...] = fields
        self._mmap = mmap.mmap(self._fd, fields[8], access=mmap.ACCESS_READ)
        self._bytes = memoryview(self._mmap)
        self._words = self._bytes.cast("Q")
        self._ring_at = self._data_at + self._in_flight * self._slot_bytes
        self._chains = Chains()
        self._decoder = SlotDecoder(self._bytes, self._names)

    def _recall_chains(self, chains_from: int) -> None:
        """Take up again the parts of timelines that an earlier reader had seen and not finished."""
        for seq in range(max(chains_from, self.next_seq - self._ring), self.next_seq):
            at = self._ring_at + seq % self._ring * self._slot_bytes
            slot = bytes(self._bytes[at : at + self._slot_bytes])
            if int.from_bytes(slot[:8], "little") == self._words[at >> 3] == seq + 1:
                self._chains.take(slot, seq)

    @property
    def chains_from(self) -> int:
        """The earliest slot that a reader which goes on at `next_seq` must know; save it too."""
        oldest: int = self.next_seq - self._ring
        return max(self._chains.first_seq(self.next_seq), oldest)

    def close(self) -> None:
        """Let go of the file; nothing is deleted."""
        if self._mmap.closed:
            return
        self._decoder.close()
        self._words.release()
        self._bytes.release()
        self._mmap.close()
        os.close(self._fd)

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
        words = self._words
        pair = fmt.ANCHOR_WORDS + 2 * ((words[fmt.ANCHOR_COUNT_WORD] - 1) % 2)
        return Process(
            ring_id=ring_id.hex(),
            pid=pid,
            service=_text(service),
            host=_text(host),
            boot_id=_text(boot),
            anchor=Anchor(words[pair], words[pair + 1]),
            cost=InstrumentCost(words[fmt.COST_BASE_WORD], words[fmt.COST_STAGE_WORD]),
            version=_text(version),
            python=_text(python),
        )

    def counters(self) -> dict[str, int]:
        """Give the writer's counters and ours: what was refused, dropped, overwritten or lost."""
        counts = {name: self._words[fmt.COUNTER_WORDS + i] for i, name in enumerate(fmt.COUNTERS)}
        return counts | {"overwritten": self.overwritten, "lost": self.lost}

    def waits(self) -> dict[str, int]:
        """Give the process's own waits (`recorder_format.WAITS`): loop lag, thread pool, GC."""
        return {name: self._words[fmt.WAIT_WORDS + i] for i, name in enumerate(fmt.WAITS)}

    def wait(self, name: str) -> int:
        """Give one figure of `waits`."""
        return int(self._words[fmt.WAIT_WORDS + fmt.WAITS.index(name)])

    def writer_alive(self) -> bool:
        """Tell whether the process still holds the file; killed processes do not."""
        if not try_lock(self._fd, shared=True):
            return True
        fcntl.flock(self._fd, fcntl.LOCK_UN)
        return False

    def poll(self, limit: int = 4096) -> list[Record]:
        """Read up to *limit* records that were committed since the last call, in order.

        Raises RecorderFileError where the file was cut off since it was opened.
        """
        if (size := os.fstat(self._fd).st_size) < self._fields[8]:
            # Touching what is gone would end this process (SIGBUS).
            raise _bad(
                self.path, size, f"it was cut off while it was read, from {self._fields[8]} bytes"
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
        stalls = [stall for stall in known if stall.end_ns > first_ns and stall.start_ns < last_ns]
        if not stalls:
            return records
        return [_with_stalls(r, stalls) if isinstance(r, RequestRecord) else r for r in records]

    def _next_slot(self) -> bytes | None:
        """Copy the slot of `next_seq`; None where it is not written yet."""
        margin = 0
        while True:
            at = self._ring_at + self.next_seq % self._ring * self._slot_bytes
            begin = self._words[at >> 3]
            if begin == self.next_seq + 1:
                slot = bytes(self._bytes[at : at + self._slot_bytes])
                if self._words[at >> 3] == begin:
                    self._hole_since_ns = 0
                    return slot
            elif begin > self.next_seq + 1 and (begin - 1 - self.next_seq) % self._ring == 0:
                self._skip_overwritten(margin)
                # The writer goes on while we look: keep further ahead of it each time.
                margin = min(2 * margin + 16, self._ring // 2)
            elif not self._skip_hole():
                return None

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
        """Give the begin words of the next *count* slots (of all slots where None).

        A word that does not belong to the place where it stands is damage, and left out.
        """
        words, step, start = self._words, self._slot_bytes >> 3, self._ring_at >> 3
        first, ring = self.next_seq, self._ring
        seen = [
            (words[start + seq % ring * step], seq + 1)
            for seq in range(first, first + (ring if count is None else min(count, ring)))
        ]
        return [begin for begin, place in seen if begin and (begin - place) % ring == 0]

    def requests_in_flight(self) -> int:
        """Count the requests that are being served now."""
        first, last = self._data_at, self._ring_at
        kinds = bytes(self._bytes[first + fmt.OPENED_AT : last : self._slot_bytes])
        states = bytes(self._bytes[first + fmt.STATE_AT : last : self._slot_bytes])
        open_request = (fmt.KIND_REQUEST, fmt.STATE_OPEN)
        return sum(pair == open_request for pair in zip(kinds, states, strict=True))

    def serving_since(self) -> list[int]:
        """Give the starts (monotonic ns) of the requests that are being served now."""
        starts = []
        for at in range(self._data_at, self._ring_at, self._slot_bytes):
            kind, state = self._bytes[at + fmt.OPENED_AT], self._bytes[at + fmt.STATE_AT]
            if (kind, state) == (fmt.KIND_REQUEST, fmt.STATE_OPEN):
                starts.append(int(self._words[(at + fmt.OPENED_AT + 8) >> 3]))
        return starts

    def in_flight(self, now_ns: int) -> list[Record]:
        """Give what was begun and not finished, as records in the state `died`.

        For a process that is gone: call it after `poll` has returned everything.
        *now_ns* (monotonic) is taken as the end of what was still open: the moment at which
        the death was noticed is all that can be known.
        A request that was finished, but whose commit was cut off, comes as finished.
        """
        chains = self._chains
        heads: list[bytes] = []
        for index in range(self._in_flight):
            at = self._data_at + index * self._slot_bytes
            if self._bytes[at + fmt.STATE_AT] == fmt.STATE_FREE or self._committed(at):
                continue
            slot = bytes(self._bytes[at : at + self._slot_bytes])
            if not chains.take(slot):
                heads.append(slot)
        process = self.process
        records = (self._decoder.decode(s, process, -1, chains, now_ns=now_ns) for s in heads)
        return self._stalled([record for record in records if record is not None])

    def _committed(self, at: int) -> bool:
        commit = self._words[(at >> 3) + fmt.COMMIT_WORD]
        if not commit:
            return False
        ring_slot = self._ring_at + (commit - 1) % self._ring * self._slot_bytes
        return bool(self._words[ring_slot >> 3] >= commit)


def _with_stalls(record: RequestRecord, stalls: list[Stall]) -> RequestRecord:
    first_ns, last_ns = record.start_ns, record.start_ns + record.duration_ns
    met = [stall for stall in stalls if stall.end_ns > first_ns and stall.start_ns < last_ns]
    if not met:
        return record
    return replace(record, stalls=overlap(met, first_ns, record.duration_ns, record.stages))


def check_header(path: Path, header: bytes, size: int) -> tuple[Any, ...]:
    """Check and unpack a header; raises RecorderFileError with file, offset and cause."""
    if header[:8] != fmt.MAGIC:
        raise _bad(path, 0, f"it is no recorder file (begins {header[:8]!r})")
    if len(header) < fmt.NAMES_AT:
        raise _bad(path, len(header), f"it is cut off after {size} bytes, inside the header")
    version = int.from_bytes(header[8:10], "little")
    if version > fmt.VERSION:
        raise _bad(path, 8, f"its format is {version}, this stagescope reads up to "
                            f"{fmt.VERSION}: upgrade stagescope")  # fmt: skip
    if version == 0:
        raise _bad(path, 8, "its format is 0, which there never was")
    crc_at = fmt.HEADER_CRC_AT
    crc = int.from_bytes(header[crc_at : crc_at + 4], "little")
    if zlib.crc32(header[:crc_at]) != crc:
        raise _bad(path, crc_at, "its header is damaged (checksum differs)")
    fields = fmt.HEADER.unpack_from(header)
    _, _, _, data_at, slot_bytes, in_flight, ring, names, whole = fields[:9]
    layout = (data_at, slot_bytes, names, whole)
    if ring == 0 or layout != (
        fmt.DATA_AT, fmt.SLOT_BYTES, fmt.NAME_CAPACITY, fmt.file_bytes(in_flight, ring)
    ):  # fmt: skip
        raise _bad(path, 12, "its layout is not that of its format")
    if size < fields[8]:
        raise _bad(path, size, f"it is cut off: {size} bytes of {fields[8]}")
    return fields


def _bad(path: Path, offset: int, cause: str) -> RecorderFileError:
    return RecorderFileError(f"recorder file {path}, byte {offset}: {cause}")


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode("utf-8", "replace")
