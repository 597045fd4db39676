"""The run store: what the spool's processes recorded for load runs, kept for the load driver.

One file a run, `<spool>/runs/<run id>.ndjson`, in the lines of wire.py: giving a run's records
away is sending its file. A line is whole when its newline is there; a tail without one was cut
off with the agent that wrote it, and is dropped and read again from the recorder file.
"""

from __future__ import annotations

import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from stagescope.agent.run_file import RunCounts, RunFile
from stagescope.errors import StagescopeError, UsageError
from stagescope.identity import RUN_ID
from stagescope.records import Record

MAX_AGE_S = 24 * 3600
MAX_BYTES = 1 << 30
"""All runs together; less where the file system has less room (see `room_for_runs`)."""
SUFFIX = ".ndjson"

_log = logging.getLogger("stagescope")


class RunStore:
    """A sink that keeps the records of load runs, each once, within bounds.

    The oldest whole run goes first; the run being written is never cut to make room.
    Safe to use from several threads.
    """

    def __init__(
        self, folder: Path, *, max_bytes: int | None = None, wall: Callable[[], float] = time.time
    ) -> None:
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
        except OSError as wrong:
            raise StagescopeError(f"run store {folder} cannot be made: {wrong.strerror}") from None
        self._folder = folder
        self._max_bytes = room_for_runs(folder) if max_bytes is None else max_bytes
        self._wall = wall
        self._lock = threading.Lock()
        self._runs = {
            path.name.removesuffix(SUFFIX): RunFile(path) for path in folder.glob(f"*{SUFFIX}")
        }
        self.accepted = 0
        names = ("stored", "duplicates", "refused", "evicted_runs")
        self._counts: dict[str, int] = dict.fromkeys(names, 0)
        self._said_full = False
        self._newest_s = 0.0
        self.forget_old()

    @property
    def settled(self) -> int:
        """All that was accepted: a line is in its file when `accept` returns."""
        return self.accepted

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
        """Tell whether a record of any run came in the last *quiet_s* seconds."""
        return self._wall() - self._newest_s < quiet_s

    def _append(self, run_id: str, records: list[Record]) -> None:
        if not RUN_ID.fullmatch(run_id):  # it would name a file elsewhere
            self._counts["refused"] += len(records)
            return
        run = self._runs.get(run_id)
        if run is None:
            run = self._runs[run_id] = RunFile(self._folder / f"{run_id}{SUFFIX}")
        try:
            addition = run.prepare(records)
            self._make_room(run, len(addition.data))
            run.append(addition)
        except OSError as problem:
            self._refuse(run, len(records), problem)
            return
        self._counts["stored"] += len(addition.records)
        self._counts["duplicates"] += len(records) - len(addition.records)

    def _make_room(self, keep: RunFile, needed: int) -> None:
        while (total := self._total_bytes()) + needed > self._max_bytes:
            others = [(run.written_s(), name) for name, run in self._runs.items() if run != keep]
            if not others:
                raise OSError(f"it alone has {total} of the {self._max_bytes} bytes for runs")
            self._evict(min(others)[1])

    def _evict(self, run_id: str) -> None:
        self._runs.pop(run_id).delete()
        self._counts["evicted_runs"] += 1

    def _refuse(self, run: RunFile, count: int, problem: OSError) -> None:
        self._counts["refused"] += count
        if not self._said_full:
            self._said_full = True
            _log.warning("records of load run %s find no room and are left out: %s; "
                         "said once, counted as runs_refused", run.path.stem, problem)  # fmt: skip

    def _total_bytes(self) -> int:
        return sum(run.size for run in self._runs.values())

    def forget_old(self) -> None:
        """Delete the runs that nothing was added to for a day."""
        with self._lock:
            limit = self._wall() - MAX_AGE_S
            for run_id in [name for name, run in self._runs.items() if run.written_s() < limit]:
                self._evict(run_id)

    def counts(self, run_id: str) -> RunCounts | None:
        """Count what is stored of a run; None where nothing is. Raises UsageError for a bad id."""
        with self._lock:
            run = self._find(run_id)
            return run.counts() if run else None

    def read(self, run_id: str, block_bytes: int = 1 << 18) -> Iterator[bytes] | None:
        """Give the lines stored of a run so far, in blocks; None where there are none."""
        with self._lock:
            run = self._find(run_id)
            return run.blocks(block_bytes) if run else None

    def _find(self, run_id: str) -> RunFile | None:
        if not RUN_ID.fullmatch(run_id):
            raise UsageError(
                f"{run_id[:60]!r} is no run id: 1 to 40 of letters, digits, '.', '_', '-'"
            )
        run = self._runs.get(run_id)
        return run if run and run.size else None

    def counters(self) -> dict[str, int]:
        """Give records stored, left out as duplicates, refused; runs evicted."""
        with self._lock:
            return dict(self._counts)

    def gauges(self) -> dict[str, float]:
        """Give how many runs are kept, and their bytes."""
        with self._lock:
            return {"runs_files": len(self._runs), "runs_bytes": self._total_bytes()}

    def close(self, timeout_s: float) -> None:
        """Nothing to do: no file is kept open."""


def room_for_runs(folder: Path) -> int:
    """Give the bytes that runs may take: a quarter of what is free there, at most MAX_BYTES.

    The spool is in memory by default, so what runs take is taken from the models.
    """
    try:
        used = sum(path.stat().st_size for path in folder.glob(f"*{SUFFIX}"))
        return min(MAX_BYTES, (shutil.disk_usage(folder).free + used) // 4)
    except OSError as problem:
        raise StagescopeError(f"run store {folder} cannot be read: {problem.strerror}") from None
