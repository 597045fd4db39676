"""Memory of a process with its shared pages counted by share (PSS) and not at all (USS).

The kernel walks the process's page tables for that, 17 ms for each GiB that is resident. So it is
done on a thread of its own, one process after the other, at most once a minute, and the less
often the longer it takes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from stagescope.agent.host.proc import counts, level, process_stat, read
from stagescope.agent.host.watched import Watched
from stagescope.samples import Sample

PERIOD_NS = 60_000_000_000
SHARE = 3000
"""A reading that took a ns is not done again for so many: 0.03 % of a core for each process."""
FIRST_NS = 5_000_000_000
"""After a process is first seen; its start is no time to be walked through."""

_PRIVATE = {"Private_Clean", "Private_Dirty"}

Add = Callable[[Sequence[Sample]], None]


class ProportionalMemory:
    """Reads `smaps_rollup` of those processes whose turn it is."""

    def __init__(self, proc: str, add: Add, clock: Callable[[], int]) -> None:
        """*add* takes the samples, from any thread."""
        self._proc = proc
        self._add = add
        self._clock = clock
        self._due: dict[Watched, int] = {}
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    def begin(self, watched: Sequence[Watched]) -> None:
        """Begin to read those whose turn it is, where the last round is over."""
        if self._closing.is_set() or (self._thread and self._thread.is_alive()):
            return
        now_ns = self._clock()
        self._due = {one: self._due.get(one, now_ns + FIRST_NS) for one in watched}
        due = [one for one, due_ns in self._due.items() if due_ns <= now_ns]
        if due:
            self._thread = threading.Thread(
                target=self._read_all, args=(due,), name="stagescope-memory", daemon=True
            )
            self._thread.start()

    def _read_all(self, due: Sequence[Watched]) -> None:
        for one in due:
            if self._closing.is_set():
                return
            begun_ns = self._clock()
            used_ns = time.thread_time_ns()
            samples = self._read(one)
            used_ns = time.thread_time_ns() - used_ns
            now_ns = self._clock()
            self._due[one] = now_ns + max(PERIOD_NS, SHARE * used_ns)
            cost = Sample(
                "stagescope.collector.cpu_time", begun_ns, now_ns, used_ns / 1e9,
                detail="host.memory",
            )  # fmt: skip
            self._add([*samples, cost])

    def _read(self, one: Watched) -> list[Sample]:
        found = counts(read(f"{self._proc}/{one.here}/smaps_rollup"))
        now_ns = self._clock()
        stat = process_stat(self._proc, one.here)
        if not found or stat is None or stat.start_ticks != one.start_ticks:
            return []
        kib = {
            "pss": found.get("Pss"),
            "uss": found["Private_Clean"] + found["Private_Dirty"]
            if set(found) >= _PRIVATE
            else None,
            "swap": found.get("SwapPss"),
        }
        return [
            level(f"stagescope.process.memory.{name}", now_ns, value * 1024, one.pid)
            for name, value in kib.items()
            if value is not None
        ]

    def close(self) -> None:
        """End the thread, after the process that it is reading."""
        self._closing.set()
        if self._thread:
            self._thread.join()
