"""Which processes are watched: those that serve, found in the /proc of here, and their children.

A pid says nothing across containers. Who holds the lock of a recorder file is its process, and
`/proc/locks` has that one's pid as seen from here.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagescope.agent.host.proc import namespace_pids, process_stat, read
from stagescope.records import Process

LOOK_AGAIN = 10
"""Children, and processes that were not found, are looked for at one reading in so many."""
MOST = 64
"""Watched at most, those that serve first: the rest is absent."""

_log = logging.getLogger("stagescope")


@dataclass(frozen=True, slots=True)
class Watched:
    """One process, told from those before and after it that had the same pid."""

    pid: int
    """As it knows itself: the pid of its records; of a child, as seen from here."""
    here: int
    """Its pid as seen from here."""
    start_ticks: int
    serves: int = 0
    """Of a child without records of its own: the `pid` of the process that it works for."""


class Watch:
    """Keeps the list of watched processes."""

    def __init__(self, alive: Callable[[], Sequence[tuple[Path, Process]]], proc: str) -> None:
        """*alive* gives the recorder files of live processes; *proc* is the folder `/proc`."""
        self._alive = alive
        self._proc = proc
        self._found: dict[Path, Watched | None] = {}
        self._children: list[Watched] = []
        self._family = _Family(proc)
        self._looks = 0

    def look(self) -> list[Watched]:
        """Return those watched now, each pid once."""
        again = self._looks % LOOK_AGAIN == 0
        self._looks += 1
        rings = self._alive()
        self._found = {path: self._served(path, process, again=again) for path, process in rings}
        served = {one.pid: one for one in self._found.values() if one}
        if again:
            self._children = list(self._family.children(list(served.values())))
        here = {one.here for one in served.values()}
        children = (one for one in self._children if one.here not in here and one.serves in served)
        return [*served.values(), *children][:MOST]

    def _served(self, path: Path, process: Process, *, again: bool) -> Watched | None:
        found = self._found.get(path)
        if found or (path in self._found and not again):
            return found
        here = pid_here(self._proc, path, process.pid)
        stat = process_stat(self._proc, here) if here else None
        if stat is None and path not in self._found:
            _log.info(
                "worker %d of %s is not visible in %s (another pid namespace?): "
                "its CPU, memory and cgroup are absent", process.pid, process.service, self._proc,
            )  # fmt: skip
        return Watched(process.pid, here, stat.start_ticks) if stat else None


def pid_here(proc: str, ring: Path, pid: int) -> int:
    """Return the pid, seen from here, of the process that wrote *ring* and calls itself *pid*.

    0 where it is not to be seen.
    """
    for here in _lockers(proc, ring):
        if pid in namespace_pids(proc, here)[-1:]:
            return here
    # Where locks are hidden: the process of that pid, if the file is in its memory.
    return pid if pid in namespace_pids(proc, pid)[-1:] and _maps(proc, pid, ring) else 0


def _lockers(proc: str, ring: Path) -> Iterator[int]:
    """Yield who has locked the file, by the file's number: names and devices differ by container."""
    try:
        wanted = f":{os.stat(ring).st_ino} ".encode()
    except OSError:
        return
    for line in (read(f"{proc}/locks") or b"").splitlines():
        words = line.split()
        if wanted in line and len(words) > 5 and words[1] == b"FLOCK" and words[4].isdigit():
            yield int(words[4])


def _maps(proc: str, here: int, ring: Path) -> bool:
    """Return whether a process has a file of this name in its memory."""
    return f"/{ring.name}".encode() in (read(f"{proc}/{here}/maps") or b"")


class _Family:
    """Who is whose parent."""

    def __init__(self, proc: str) -> None:
        self._proc = proc
        self._parents: dict[int, int] = {}

    def children(self, served: Sequence[Watched]) -> Iterator[Watched]:
        """Yield all descendants of *served* that are not among them."""
        self._look()
        belongs = {one.here: one.pid for one in served}
        below: dict[int, list[int]] = {}
        for pid, parent in self._parents.items():
            below.setdefault(parent, []).append(pid)
        waiting = list(belongs)
        while waiting:
            parent = waiting.pop()
            for pid in below.get(parent, []):
                if pid not in belongs:
                    belongs[pid] = belongs[parent]
                    waiting.append(pid)
                    if stat := process_stat(self._proc, pid):
                        yield Watched(pid, pid, stat.start_ticks, serves=belongs[pid])

    def _look(self) -> None:
        """Read the parents of processes that are new; an orphan keeps the one that it had."""
        try:
            pids = {int(name) for name in os.listdir(self._proc) if name.isdigit()}
        except OSError:
            pids = set()
        self._parents = {pid: parent for pid, parent in self._parents.items() if pid in pids}
        for pid in pids - self._parents.keys():
            if stat := process_stat(self._proc, pid):
                self._parents[pid] = stat.parent
