"""The run store: what the spool's processes recorded for load runs, kept for the load driver.

One file a run, `<spool>/runs/<run id>.ndjson`, in the lines of serialize.py: giving a run's records
away is sending its file. A line is whole when its newline is there; a tail without one was cut
off with the agent that wrote it, and is dropped and read again from the recorder file.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import BinaryIO

from stagescope.agent.log_once import LogOnce
from stagescope.agent.sinks import PromptSink
from stagescope.agent.store.serialize import process_line, record_line
from stagescope.errors import StagescopeError
from stagescope.identity import RUN_ID, check_run_id
from stagescope.recorder.spool import OPEN_RUN_SUFFIX
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


class RunFile:
    """Appends records to one run's file; knows which are there already.

    A process's records come in the order of their sequence numbers, so one number a process
    says what is there; records of processes that died (seq -1) are known by their span ids.
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
        """Return when something was last added, seconds since the Unix epoch."""
        return _modified_s(self.path, float("inf"))  # one not made yet is the newest of all

    def counts(self) -> RunCounts:
        """Count what is stored."""
        self._load()
        finished = self._requests - self._died
        return RunCounts(self.path.stem, self._requests, self._batches, finished, self._died)

    def prepare(self, records: list[Record]) -> tuple[bytes, list[Record]]:
        """Return those of *records* that are not there yet, as lines and as they are."""
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
        return "".join(lines).encode("ascii"), fresh

    def append(self, data: bytes, records: list[Record]) -> None:
        """Write what `prepare` gave; raises OSError, with the file as it was, where there is no room."""
        if not data:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(self.path, flags, 0o600)
        try:
            _write_whole(fd, data, self.size)
        except OSError:
            os.ftruncate(fd, min(self.size, os.fstat(fd).st_size))
            raise
        finally:
            os.close(fd)
        self.size += len(data)
        for record in records:
            ring_id, is_request = record.process.ring_id, isinstance(record, RequestRecord)
            self._processes[ring_id] = record.process
            died = record.state is State.DIED
            self._note(ring_id, record.seq, _span(record), is_request=is_request, died=died)

    def blocks(self, block_bytes: int = _BLOCK_BYTES) -> Iterator[bytes]:
        """Return the whole lines that are there now, in blocks of about *block_bytes*."""
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


MAX_AGE_S = 24 * 3600
MAX_UNOPENED = 16
"""Runs kept that no driver has opened: anybody who sends requests can invent one."""
IDLE_S = 60.0
"""A run that nobody opened gives way to a new one when nothing was added to it for so long."""
MAX_BYTES = 1 << 30
"""All runs together; less where the file system has less room (see `room_for_runs`)."""
BLOCK_BYTES = 4096
SUFFIX = ".ndjson"


class RunStore(PromptSink):
    """A sink that keeps the records of load runs, each once, within bounds.

    A driver opens its run here; a run that only its requests name (k6, a driver elsewhere) is
    kept too, but of those there are few at a time. The oldest whole run goes first, and those
    that were not opened before those that were; the run being written is never cut to make room.
    Safe to use from several threads.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int | None = None, wall: Callable[[], float] = time.time
    ) -> None:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
        except OSError as wrong:
            raise StagescopeError(f"run store {folder} cannot be made: {wrong.strerror}") from None
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            raise StagescopeError(
                f"run store {folder} is not this user's own folder: remove it, or name another "
                "spool with STAGESCOPE_SPOOL"
            )
        self._folder = folder
        self._max_bytes = room_for_runs(folder) if max_bytes is None else max_bytes
        self._wall = wall
        self._lock = threading.Lock()
        self._runs = {
            path.name.removesuffix(SUFFIX): RunFile(path) for path in folder.glob(f"*{SUFFIX}")
        }
        self._opened = {
            path.name.removesuffix(OPEN_RUN_SUFFIX) for path in folder.glob(f"*{OPEN_RUN_SUFFIX}")
        }
        self._full_until_s = 0.0
        """Until then no run that was not opened is idle, so none can give way."""
        names = ("stored", "duplicates", "refused", "evicted_runs")
        self._counts: dict[str, int] = dict.fromkeys(names, 0)
        self._log = LogOnce()
        self._newest_s = 0.0
        self.forget_old()

    def accept(self, records: Sequence[Record]) -> None:
        """Append those records that belong to a run; what is there already is left out."""
        by_run: dict[str, list[Record]] = {}
        for record in records:
            if record.run_id:
                by_run.setdefault(record.run_id, []).append(record)
        if by_run:
            self._newest_s = self._wall()
        with self._lock:
            for run_id, of_run in by_run.items():
                self._append(run_id, of_run)
            self.accepted += len(records)

    def under_way(self, quiet_s: float) -> bool:
        """Return whether a record of any run came in the last *quiet_s* seconds."""
        return self._wall() - self._newest_s < quiet_s

    def _append(self, run_id: str, records: list[Record]) -> None:
        if not RUN_ID.fullmatch(run_id):  # it would name a file elsewhere
            self._counts["refused"] += len(records)
            return
        run = self._runs.get(run_id)
        if run is None:
            if run_id not in self._opened and not self._has_place():
                self._counts["refused"] += len(records)
                return
            run = self._runs[run_id] = RunFile(self._folder / f"{run_id}{SUFFIX}")
        try:
            data, fresh = run.prepare(records)
            self._make_room(run, len(data))
            run.append(data, fresh)
        except OSError as problem:
            self._refuse(run, len(records), problem)
            return
        self._counts["stored"] += len(fresh)
        self._counts["duplicates"] += len(records) - len(fresh)

    def open(self, run_id: str) -> None:
        """Note that a driver has opened *run_id*: it is kept, and `Server-Timing` may answer it.

        Raises UsageError for a bad id, StagescopeError where the mark cannot be written.
        """
        check_run_id(run_id)
        with self._lock:
            try:
                flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
                os.close(os.open(self._mark(run_id), flags, 0o600))
            except OSError as problem:
                raise StagescopeError(
                    f"load run {run_id} cannot be opened in {self._folder}: {problem.strerror}"
                ) from None
            self._opened.add(run_id)

    def opened_since_s(self) -> float:
        """Return since when a run has been open that was not closed, seconds since the Unix epoch."""
        with self._lock:
            return min((_modified_s(self._mark(name), inf) for name in self._opened), default=inf)

    def close_run(self, run_id: str) -> None:
        """Note that the driver has what it wanted of *run_id*; what is stored stays for now."""
        check_run_id(run_id)
        with self._lock:
            self._mark(run_id).unlink(missing_ok=True)
            self._opened.discard(run_id)
            self._full_until_s = 0.0

    def _mark(self, run_id: str) -> Path:
        return self._folder / f"{run_id}{OPEN_RUN_SUFFIX}"

    def _has_place(self) -> bool:
        """Return whether one more run may come that no driver has opened; an idle one gives way."""
        now_s = self._wall()
        if now_s < self._full_until_s:
            return False  # Decided without a look at the disk: a stranger may ask it every time.
        unopened = [
            (run.written_s(), name) for name, run in self._runs.items() if name not in self._opened
        ]
        if len(unopened) < MAX_UNOPENED:
            return True
        written_s, oldest = min(unopened)
        if now_s - written_s < IDLE_S:
            self._full_until_s = min(written_s, now_s) + IDLE_S
            return False
        self._evict(oldest)
        return True

    def _make_room(self, keep: RunFile, needed: int) -> None:
        more = _on_disk(keep.size + needed) - _on_disk(keep.size)
        while (total := self._total_bytes()) + more > self._max_bytes:
            others = [
                (name in self._opened, run.written_s(), name)
                for name, run in self._runs.items()
                if run != keep
            ]
            if not others:
                raise OSError(f"it alone has {total} of the {self._max_bytes} bytes for runs")
            self._evict(min(others)[2])

    def _evict(self, run_id: str) -> None:
        self._runs.pop(run_id).delete()
        self._counts["evicted_runs"] += 1

    def _refuse(self, run: RunFile, count: int, problem: OSError) -> None:
        self._counts["refused"] += count
        self._log(f"records of load run {run.path.stem} find no room and are left out: {problem}; "
                  "logged once, counted as runs_refused", about="full")  # fmt: skip

    def _total_bytes(self) -> int:
        return sum(_on_disk(run.size) for run in self._runs.values())

    def forget_old(self) -> None:
        """Delete the runs that nothing was added to for a day."""
        with self._lock:
            limit = self._wall() - MAX_AGE_S
            for run_id in [name for name, run in self._runs.items() if run.written_s() < limit]:
                self._evict(run_id)
            for run_id in [
                name for name in self._opened if _modified_s(self._mark(name), 0.0) < limit
            ]:
                self._mark(run_id).unlink(missing_ok=True)
                self._opened.discard(run_id)

    def counts(self, run_id: str) -> RunCounts | None:
        """Count what is stored of a run; None where nothing is. Raises UsageError for a bad id."""
        with self._lock:
            run = self._find(run_id)
            return run.counts() if run else None

    def read(self, run_id: str, block_bytes: int = 1 << 18) -> Iterator[bytes] | None:
        """Return the lines stored of a run so far, in blocks; None where there are none."""
        with self._lock:
            run = self._find(run_id)
            return run.blocks(block_bytes) if run else None

    def _find(self, run_id: str) -> RunFile | None:
        check_run_id(run_id)
        run = self._runs.get(run_id)
        return run if run and run.size else None

    def counters(self) -> dict[str, int]:
        """Return records stored, left out as duplicates, refused; runs evicted."""
        with self._lock:
            return dict(self._counts)

    def gauges(self) -> dict[str, float]:
        """Return how many runs are kept, and their bytes."""
        with self._lock:
            return {"runs_files": len(self._runs), "runs_bytes": self._total_bytes()}


def _on_disk(size: int) -> int:
    """Return the bytes that a file of *size* takes: a file of one line takes a whole block."""
    return -(-size // BLOCK_BYTES) * BLOCK_BYTES


def _modified_s(path: Path, missing: float) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return missing


def room_for_runs(folder: Path) -> int:
    """Return the bytes that runs may take: a quarter of what is free there, at most MAX_BYTES.

    The spool is in memory by default, so what runs take is taken from the models.
    """
    try:
        used = sum(_on_disk(path.stat().st_size) for path in folder.glob(f"*{SUFFIX}"))
        return min(MAX_BYTES, (shutil.disk_usage(folder).free + used) // 4)
    except OSError as problem:
        raise StagescopeError(f"run store {folder} cannot be read: {problem.strerror}") from None
