"""Writes recorder files by the format's text alone: for rings no real server would leave behind."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import NamedTuple, Self

from stagescope.recorder import format as fmt
from stagescope.stages import KNOWN

_ENTRIES = Struct(f"<{fmt.ENTRIES_PER_SLOT}H{2 * fmt.ENTRIES_PER_SLOT}Q")


class Opening(NamedTuple):
    """A stage as the writer saw it; `end_ns` None leaves it open."""

    stage: str
    start_ns: int
    end_ns: int | None


SIX = tuple(
    Opening(stage, 1_000_000 * at, 1_000_000 * (at + 1))
    for at, stage in enumerate(
        ("queue", "preprocess", "batch.wait", "inference", "postprocess", "respond")
    )
)
"""One millisecond in each of the six stages."""


class RingWriter:
    """A recorder file and the process that seems to hold it: `close()` is that process's death."""

    def __init__(
        self,
        path: Path,
        *,
        ring_slots: int = 64,
        in_flight_slots: int = 8,
        service: str = "test",
        boot_id: str = "00000000-test",
        version: int = fmt.VERSION,
    ) -> None:
        self.path = path
        self.ring_id = secrets.token_hex(16)
        self.next_seq = 0
        self._ring = ring_slots
        self._in_flight = in_flight_slots
        size = fmt.file_bytes(in_flight_slots, ring_slots)
        hidden = path.with_suffix(".new")
        self._fd = os.open(hidden, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.ftruncate(self._fd, size)
        header = fmt.HEADER.pack(
            fmt.MAGIC, version, 0, fmt.DATA_AT, fmt.SLOT_BYTES, in_flight_slots, ring_slots,
            fmt.NAME_CAPACITY, size, os.getpid(), 0, bytes.fromhex(self.ring_id),
            boot_id.encode(), b"testhost", service.encode(), b"0.1.0", b"3.11",
        )  # fmt: skip
        os.pwrite(self._fd, header + zlib.crc32(header).to_bytes(4, "little"), 0)
        self._word(fmt.ANCHOR_WORDS, time.monotonic_ns())
        self._word(fmt.ANCHOR_WORDS + 1, time.time_ns())
        self._word(fmt.ANCHOR_COUNT_WORD, 1)
        self.set_cost(base_ns=3000, stage_ns=500)
        self._codes: dict[str, int] = {}
        for name in KNOWN:
            self._code(name)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        hidden.rename(path)

    def close(self) -> None:
        """Close the file, as a process does that ends."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def set_cost(self, *, base_ns: int, stage_ns: int) -> None:
        """Write what the middleware measured of itself."""
        self._word(fmt.COST_BASE_WORD, base_ns)
        self._word(fmt.COST_STAGE_WORD, stage_ns)

    def set_counter(self, name: str, value: int) -> None:
        """Write one of the writer's counters."""
        self._word(fmt.COUNTER_WORDS + fmt.COUNTERS.index(name), value)

    def set_wait(self, name: str, value: int) -> None:
        """Write one of the process's waits (see WAITS in recorder/format.py)."""
        self._word(fmt.WAIT_WORDS + fmt.WAITS.index(name), value)

    def request(
        self,
        run_id: str = "",
        *,
        stages: Sequence[Opening] = SIX,
        duration_ns: int = 6_000_000,
        path: str = "/predict",
        error: str = "",
        span_id: str = "",
        batch_id: str = "",
    ) -> int:
        """Commit one finished request; returns its sequence number."""
        start_ns = time.monotonic_ns()
        entries = self._entries(stages, start_ns)
        if batch_id:
            entries.append((fmt.CODE_BATCH, int(batch_id, 16), start_ns))
        span = bytes.fromhex(span_id) if span_id else secrets.token_bytes(8)
        chained = entries[fmt.ENTRIES_PER_SLOT :]
        for index in range(0, len(chained), fmt.ENTRIES_PER_SLOT):
            piece = chained[index : index + fmt.ENTRIES_PER_SLOT]
            number = 1 + index // fmt.ENTRIES_PER_SLOT
            self._commit(
                self._slot(fmt.KIND_CHAIN, fmt.STATE_FINISHED, span, piece, start_ns, index=number)
            )
        finished = fmt.FINISHED.pack(
            duration_ns, 10, 20, 500, 0, 1, 0, 200, 0, 0, error.encode(), b"/predict"
        )
        head = entries[: fmt.ENTRIES_PER_SLOT]
        return self._commit(
            self._slot(
                fmt.KIND_REQUEST, fmt.STATE_FINISHED, span, head, start_ns, run_id, path, finished
            )
        )

    def batch(
        self, run_id: str = "", *, members: int = 2, model: str = "resnet", span_id: str = ""
    ) -> int:
        """Commit one finished batch; returns its sequence number."""
        start_ns = time.monotonic_ns()
        entries = self._entries([Opening("inference", 0, 1_000_000)], start_ns)
        for number in range(1, members + 1):
            entries += [(fmt.CODE_MEMBER, number, number), (fmt.CODE_MEMBER_TRACE, number, 0)]
        span = bytes.fromhex(span_id) if span_id else secrets.token_bytes(8)
        finished = fmt.FINISHED.pack(1_000_000, 0, 0, 0, 0, members, 0, 0, 0, 0, b"", b"")
        slot = self._slot(
            fmt.KIND_BATCH, fmt.STATE_FINISHED, span, entries, start_ns, run_id,
            model, finished,
        )  # fmt: skip
        return self._commit(slot)

    def begin(self, place: int, run_id: str = "", stage: str = "inference") -> str:
        """Leave a request in flight at *place*, open in *stage*; returns its span id."""
        span = secrets.token_bytes(8)
        start_ns = time.monotonic_ns()
        entries = self._entries([Opening(stage, 1000, None)], start_ns)
        slot = self._slot(fmt.KIND_REQUEST, fmt.STATE_OPEN, span, entries, start_ns, run_id)
        os.pwrite(self._fd, slot, fmt.DATA_AT + place * fmt.SLOT_BYTES)
        return span.hex()

    def commit_chain_only(self, span_id: str, stages: Sequence[Opening]) -> None:
        """Commit the continuation of a timeline whose head is still to come."""
        entries = self._entries(stages, time.monotonic_ns())
        span = bytes.fromhex(span_id)
        self._commit(self._slot(fmt.KIND_CHAIN, fmt.STATE_FINISHED, span, entries, 0, index=1))

    def _slot(
        self,
        kind: int,
        state: int,
        span: bytes,
        entries: Sequence[tuple[int, int, int]],
        start_ns: int,
        run_id: str = "",
        path: str = "/predict",
        finished: bytes = bytes(fmt.FINISHED.size),
        index: int = 0,
    ) -> bytes:
        opened = fmt.OPENED.pack(
            kind, state, fmt.FLAG_SAMPLED, 0, index, start_ns, secrets.token_bytes(16),
            span, bytes(8), run_id.encode(), b"POST", path.encode(),
        )  # fmt: skip
        rows = list(entries) + [(0, 0, 0)] * (fmt.ENTRIES_PER_SLOT - len(entries))
        codes, starts, ends = zip(*rows, strict=True)
        head = (bytes(fmt.OPENED_AT) + opened + finished).ljust(fmt.ENTRIES_AT, b"\0")
        return head + _ENTRIES.pack(*codes, *starts, *ends)

    def _commit(self, slot: bytes) -> int:
        seq = self.next_seq
        self.next_seq += 1
        at = fmt.DATA_AT + (self._in_flight + seq % self._ring) * fmt.SLOT_BYTES
        os.pwrite(self._fd, bytes(8), at)
        os.pwrite(self._fd, slot[8:], at + 8)
        os.pwrite(self._fd, (seq + 1).to_bytes(8, "little"), at)
        return seq

    def _entries(self, stages: Sequence[Opening], timeline_ns: int) -> list[tuple[int, int, int]]:
        return [
            (self._code(name), timeline_ns + start, 0 if end is None else timeline_ns + end)
            for name, start, end in stages
        ]

    def _code(self, name: str) -> int:
        if name not in self._codes:
            code = len(self._codes) + 1
            text = name.encode()
            at = fmt.NAMES_AT + (code - 1) * fmt.NAME_BYTES
            os.pwrite(self._fd, bytes([len(text)]) + text, at)
            self._codes[name] = code
        return self._codes[name]

    def _word(self, word: int, value: int) -> None:
        os.pwrite(self._fd, value.to_bytes(8, "little"), word * 8)


def write_ring(path: Path, requests: int, *, run_id: str = "", ring_slots: int = 64) -> RingWriter:
    """Write a recorder file that holds *requests* finished requests; its process still lives."""
    writer = RingWriter(path, ring_slots=ring_slots)
    for _ in range(requests):
        writer.request(run_id)
    return writer
