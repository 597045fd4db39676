"""What each watched process used since it was last read: CPU, memory, threads, faults, storage."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from stagescope.agent.host.files import counts, read
from stagescope.agent.host.growth import Counter, Growth, level
from stagescope.agent.host.open_files import OpenFiles
from stagescope.agent.host.process_stat import PAGE_BYTES, TICK_S, ProcessStat, process_stat
from stagescope.agent.host.switches import Switches
from stagescope.agent.host.watched import Watched
from stagescope.samples import Sample

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

        Nothing where it is gone, or another process has its pid now.
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
