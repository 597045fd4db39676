"""What each watched process used since it was last read: CPU, memory, threads, faults, storage."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence

from stagescope.agent.host.proc import (
    PAGE_BYTES,
    TICK_S,
    Counter,
    Growth,
    ProcessStat,
    counts,
    level,
    process_stat,
    read,
)
from stagescope.agent.host.watched import Watched
from stagescope.samples import Sample

ALIKE = 8
"""By so much the two ways may differ: other threads open and close files meanwhile."""


class OpenFiles:
    """Counts them the cheap way, where the kernel has it."""

    def __init__(self, proc: str) -> None:
        """*proc* is the folder `/proc`."""
        own = f"{proc}/self/fd"
        listed, size = _listed(own), _size(own)
        self.quick = bool(listed and size and abs(listed - size) <= ALIKE)
        """True from Linux 6.2 on: the folder's size is the count.

        To list it takes the longer the more files there are, at first 30 ms for 5,000.
        """

    def count(self, folder: str) -> int | None:
        """Count those of the process with this *folder*; None where that is denied.

        The quick count works for other users' processes too, the list does not.
        """
        return _size(f"{folder}/fd") if self.quick else _listed(f"{folder}/fd")


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


def _listed(path: str) -> int | None:
    try:
        return len(os.listdir(path))
    except OSError:
        return None


# Context switches of a process: the sum over its threads, each of which has a file of its own.
#
# `/proc/PID/status` has those of the main thread alone, which is what most tools show.


MOST_THREADS = 256
"""About 3 ms; of a process with more threads nothing is reported."""

VOLUNTARY = Counter("process.context_switches", "voluntary")
INVOLUNTARY = Counter("process.context_switches", "involuntary")
_COUNTS = re.compile(
    rb"^voluntary_ctxt_switches:\s+(\d{1,19})\nnonvoluntary_ctxt_switches:\s+(\d{1,19})$",
    re.MULTILINE,
)


class Switches:
    """Sums that only grow, although threads come and go and take their counts with them."""

    def __init__(self, tasks: str) -> None:
        """*tasks* is the folder with a folder for each thread."""
        self._tasks = tasks
        self._last: dict[str, tuple[int, int]] = {}
        self._sums = 0, 0

    def read(self) -> dict[Counter, int]:
        """Read all threads; what one did between its last reading and its end is not seen."""
        try:
            threads = os.listdir(self._tasks)
        except OSError:
            return {}
        if len(threads) > MOST_THREADS:
            return {}
        now = {thread: found for thread in threads if (found := self._of(thread))}
        for thread, (voluntary, involuntary) in now.items():
            before = self._last.get(thread, (0, 0))
            if before[0] > voluntary or before[1] > involuntary:
                before = 0, 0  # another thread by the same number
            self._sums = (
                self._sums[0] + voluntary - before[0],
                self._sums[1] + involuntary - before[1],
            )
        self._last = now
        return {VOLUNTARY: self._sums[0], INVOLUNTARY: self._sums[1]} if now else {}

    def _of(self, thread: str) -> tuple[int, int] | None:
        found = _COUNTS.search(read(f"{self._tasks}/{thread}/status") or b"")
        return (int(found[1]), int(found[2])) if found else None


SLOW_EVERY = 10
"""What takes longer is read at one reading in so many: context switches, which are in a file for
each thread, and open files, where they must be listed to be counted.
"""

USER = Counter("process.cpu.time", "user", TICK_S)
SYSTEM = Counter("process.cpu.time", "system", TICK_S)
MINOR = Counter("process.paging.faults", "minor")
MAJOR = Counter("process.paging.faults", "major")
IO = {
    "read_bytes": Counter("process.disk.io", "read"),
    "write_bytes": Counter("process.disk.io", "write"),
}


class Reader:
    """One process and its last reading."""

    def __init__(self, proc: str, watched: Watched, files: OpenFiles) -> None:
        self._proc = proc
        self._files = files
        self._watched = watched
        self._folder = f"{proc}/{watched.here}"
        self._growth = Growth(watched.pid)
        self._switches = Switches(f"{self._folder}/task")

    def read(self, now_ns: int, *, slow: bool) -> list[Sample]:
        """Read it at *now_ns*, what is *slow* to read too.

        Nothing where it has exited, or another process has its pid now.
        """
        stat = process_stat(self._proc, self._watched.here)
        if stat is None or stat.start_ticks != self._watched.start_ticks:
            return []
        grown = {
            USER: stat.user_ticks,
            SYSTEM: stat.system_ticks,
            MINOR: stat.minor_faults,
            MAJOR: stat.major_faults,
        }
        io = counts(read(f"{self._folder}/io"))
        grown |= {counter: io[key] for key, counter in IO.items() if key in io}
        if slow:
            grown |= self._switches.read()
        return [*self._levels(now_ns, stat, slow=slow), *self._growth.since(now_ns, grown)]

    def _levels(self, now_ns: int, stat: ProcessStat, *, slow: bool) -> Iterator[Sample]:
        pid = self._watched.pid
        yield level("process.memory.usage", now_ns, stat.resident_pages * PAGE_BYTES, pid)
        yield level("process.thread.count", now_ns, stat.threads, pid)
        if self._watched.serves:
            yield level("stagescope.process.works_for", now_ns, 1, pid, str(self._watched.serves))
        if (slow or self._files.quick) and (files := self._files.count(self._folder)) is not None:
            yield level("process.unix.file_descriptor.count", now_ns, files, pid)


class Processes:
    """All watched processes."""

    def __init__(self, proc: str, clock: Callable[[], int]) -> None:
        self._proc = proc
        self._files = OpenFiles(proc)
        self._clock = clock
        self._readings = 0
        self._readers: dict[Watched, Reader] = {}

    def read(self, watched: Sequence[Watched]) -> Iterator[Sample]:
        """Read those *watched*; what is not watched any more is forgotten."""
        self._readers = {
            one: self._readers.get(one) or Reader(self._proc, one, self._files) for one in watched
        }
        self._readings += 1
        for one, reader in self._readers.items():
            # Not all processes at once: many threads are many files.
            slow = (self._readings + one.here) % SLOW_EVERY == 0
            yield from reader.read(self._clock(), slow=slow)
