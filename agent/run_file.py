"""One file of the run store: the lines of one load run, each record once."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from stagescope.agent.wire import process_line, record_line
from stagescope.records import BatchRecord, Process, Record, RequestRecord, State

_HEAD = re.compile(
    rb'\{"kind":"(\w+)","state":"(\w+)","ring_id":"(\w+)","seq":(-?\d+),"\w+":"(\w+)"'
)
_BLOCK_BYTES = 1 << 18


@dataclass(frozen=True, slots=True)
class RunCounts:
    """What is stored of a run; `requests` = `finished` + `died`."""

    run_id: str
    requests: int
    batches: int
    finished: int
    died: int


@dataclass(frozen=True, slots=True)
class Addition:
    """Lines to append, and the records that they hold."""

    data: bytes
    records: list[Record]


class RunFile:
    """Appends records to one run's file; knows which are there already.

    A process's records come in the order of their sequence numbers, so one number a process
    tells what is there; records of the dead (seq -1) are told by their span ids.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = path.stat().st_size if path.exists() else 0
        """Bytes of whole lines (of the file, until it is first read)."""
        self._loaded = self.size == 0
        self._last_seq: dict[str, int] = {}
        self._dead_spans: set[str] = set()
        self._processes: dict[str, Process] = {}
        self._requests = self._batches = self._died = 0

    def written_s(self) -> float:
        """Tell when something was last added, seconds since the Unix epoch."""
        try:
            return self.path.stat().st_mtime
        except OSError:
            return float("inf")  # not made yet: the newest of all

    def counts(self) -> RunCounts:
        """Count what is stored."""
        self._load()
        finished = self._requests - self._died
        return RunCounts(self.path.stem, self._requests, self._batches, finished, self._died)

    def prepare(self, records: list[Record]) -> Addition:
        """Turn those of *records* that are not there yet into lines."""
        self._load()
        lines: list[str] = []
        fresh: list[Record] = []
        last_seen = dict(self._last_seq)
        processes = dict(self._processes)
        for record in records:
            ring_id = record.process.ring_id
            if record.seq >= 0:
                if record.seq <= last_seen.get(ring_id, -1):
                    continue
                last_seen[ring_id] = record.seq
            elif _span(record) in self._dead_spans:
                continue
            if processes.get(ring_id) is not record.process:
                if processes.get(ring_id) != record.process:
                    lines.append(process_line(record.process))
                processes[ring_id] = record.process
            lines.append(record_line(record))
            fresh.append(record)
        return Addition("".join(lines).encode("ascii"), fresh)

    def append(self, addition: Addition) -> None:
        """Write the lines; raises OSError, with the file as it was, where they find no room."""
        if not addition.data:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            _write_whole(fd, addition.data, self.size)
        except OSError:
            os.ftruncate(fd, min(self.size, os.fstat(fd).st_size))
            raise
        finally:
            os.close(fd)
        self.size += len(addition.data)
        for record in addition.records:
            ring_id, is_request = record.process.ring_id, isinstance(record, RequestRecord)
            self._processes[ring_id] = record.process
            died = record.state is State.DIED
            self._note(ring_id, record.seq, _span(record), is_request=is_request, died=died)

    def blocks(self, block_bytes: int = _BLOCK_BYTES) -> Iterator[bytes]:
        """Give the whole lines that are there now, in blocks of about *block_bytes*."""
        self._load()
        # Opened now: the run may be evicted before its reader takes the first block.
        return _read_blocks(self.path.open("rb"), self.size, block_bytes)

    def delete(self) -> None:
        """Remove the file; who is reading it reads on."""
        self.path.unlink(missing_ok=True)

    def _load(self) -> None:
        """Read an earlier agent's file: what is in it, and where its last whole line ends."""
        if self._loaded:
            return
        self.size = 0
        with self.path.open("rb") as file:
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.size += len(line)
                self._note_line(line)
        self._loaded = True

    def _note_line(self, line: bytes) -> None:
        if head := _HEAD.match(line):
            kind, state, ring_id, seq, span = (field.decode() for field in head.groups())
            died = state == State.DIED.value
            self._note(ring_id, int(seq), span, is_request=kind == "request", died=died)

    def _note(self, ring_id: str, seq: int, span: str, *, is_request: bool, died: bool) -> None:
        if seq >= 0:
            self._last_seq[ring_id] = seq
        else:
            self._dead_spans.add(span)
        self._requests += is_request
        self._batches += not is_request
        self._died += is_request and died


def _span(record: Record) -> str:
    return record.batch_id if isinstance(record, BatchRecord) else record.span_id


def _write_whole(fd: int, data: bytes, at: int) -> None:
    if (size := os.fstat(fd).st_size) < at:
        raise OSError(f"somebody else cut its file to {size} bytes")
    os.ftruncate(fd, at)  # a tail that a killed agent left
    view = memoryview(data)
    while view:
        written = os.pwrite(fd, view, at)
        at += written
        view = view[written:]


def _read_blocks(file: BinaryIO, size: int, block_bytes: int) -> Iterator[bytes]:
    with file:
        while size and (block := file.read(min(size, block_bytes))):
            size -= len(block)
            yield block
