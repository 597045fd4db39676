"""Small files that the kernel writes while they are read; what cannot be read is None."""

from __future__ import annotations

import os
import re
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stagescope.proc import stat_fields
from stagescope.samples import Sample

_PAIR = re.compile(rb"^([\w.]+):?[ \t]+(\d+)(?: kB)?$", re.MULTILINE)
_BLOCK = 1 << 16


def read(path: str) -> bytes | None:
    """Return the content of *path*; None where it is missing, denied or its owner has exited."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        found = os.read(fd, _BLOCK)
        # One read gives a small file whole; procfs gives long ones page by page.
        while found and (more := os.read(fd, _BLOCK)):
            found += more
        return found
    except OSError:
        return None
    finally:
        os.close(fd)


def count(text: bytes | None) -> int | None:
    """Return the count that a file holds; None for a word such as `max`."""
    word = (text or b"").strip()
    return int(word) if word.isdigit() and len(word) < 20 else None


def counts(text: bytes | None) -> dict[str, int]:
    """Return the counts of a file with one name and one count a line (`cpu.stat`, `/proc/PID/io`)."""
    return {name.decode(): int(n) for name, n in _PAIR.findall(text or b"") if len(n) < 20}


def status(proc: str | os.PathLike[str], pid: int | str, name: str) -> str | None:
    """Return one value of `/proc/PID/status`; None where it is not there."""
    for line in (read(f"{os.fspath(proc)}/{pid}/status") or b"").splitlines():
        key, _, value = line.partition(b":")
        if key.decode("ascii", "replace") == name:
            return value.decode("utf-8", "replace").strip()
    return None


def namespace_pids(proc: str | os.PathLike[str], pid: int | str) -> list[int]:
    """Return the pids of one process, outermost first; none where there is no such process."""
    found = [int(word) for word in (status(proc, pid, "NSpid") or "").split() if word.isdigit()]
    if not found and status(proc, pid, "Name") is not None:  # a kernel before 4.1
        found = [int(pid)] if str(pid).isdigit() else []
    return found


def named(proc: Path, names: Container[str]) -> Iterator[tuple[int, str]]:
    """Yield pid and name of each process in *proc* whose name is one of *names*."""
    for folder in proc.glob("[0-9]*"):
        name = (read(f"{folder}/comm") or b"").decode("utf-8", "replace").strip()
        if name in names:
            yield int(folder.name), name


TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
ENDED = ("Z", "X")
_FIELDS = 22
"""As many as we need of those behind the name."""


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What the line holds."""

    state: str
    """One letter: `R` runs, `T` is stopped, `Z` has ended and is not waited for yet."""
    parent: int
    minor_faults: int
    major_faults: int
    user_ticks: int
    system_ticks: int
    threads: int
    start_ticks: int
    """Since the host's boot; with the pid it identifies a process."""
    resident_pages: int
    """Exact only to a few pages a core: the kernel counts ahead on each of them."""


def parse(text: bytes | None) -> ProcessStat | None:
    """Read the line; None where there is none, or it is not one of a process."""
    fields = stat_fields(text or b"")
    if len(fields) < _FIELDS:
        return None
    wanted = [fields[i] for i in (1, 7, 9, 11, 12, 17, 19, 21)]
    if not all(field.isdigit() and len(field) < 20 for field in wanted):
        return None
    return ProcessStat(fields[0].decode("ascii", "replace"), *(int(field) for field in wanted))


def process_stat(proc: str, pid: int) -> ProcessStat | None:
    """Read the line of the living process *pid* in *proc*, the folder `/proc`."""
    found = parse(read(f"{proc}/{pid}/stat"))
    return found if found and found.state not in ENDED else None


def cpu_s(pid: int) -> float:
    """Return the CPU seconds of a child, also of one that has ended; 0 where it cannot be read."""
    found = parse(read(f"/proc/{pid}/stat"))
    return (found.user_ticks + found.system_ticks) * TICK_S if found else 0.0


@dataclass(frozen=True, slots=True)
class Counter:
    """What one counter is called, and in what it counts."""

    name: str
    """One of `SAMPLE_NAMES`, of kind AMOUNT."""
    detail: str = ""
    unit: float = 1.0
    """What one count is worth in the name's unit: 1e-6 for a counter of µs."""


class Growth:
    """The last reading of the counters of one thing: a process, a cgroup, the host."""

    def __init__(self, pid: int = 0) -> None:
        self._pid = pid
        self._last: dict[Counter, tuple[int, int]] = {}

    def since(self, now_ns: int, counters: Mapping[Counter, int]) -> Iterator[Sample]:
        """Read *counters* at *now_ns*; give how much each grew since it was last read.

        One that is read for the first time gives nothing, nor does one that fell: it was reset.
        """
        for counter, value in counters.items():
            before = self._last.get(counter)
            self._last[counter] = now_ns, value
            if before is not None and before[1] <= value and before[0] < now_ns:
                amount = (value - before[1]) * counter.unit
                yield Sample(
                    counter.name, before[0], now_ns, amount, self._pid, detail=counter.detail
                )


def level(name: str, now_ns: int, value: float, pid: int = 0, detail: str = "") -> Sample:
    """Return a sample of a level at *now_ns*."""
    return Sample(name, now_ns, now_ns, value, pid, detail=detail)
