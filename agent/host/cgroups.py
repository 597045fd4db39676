"""What the cgroups of served processes used, were allowed, and were held up by.

Files: the kernel's Documentation/admin-guide/cgroup-v2.rst.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from stagescope.agent.host.pressure import cgroup_pressure
from stagescope.agent.host.proc import Counter, Growth, count, counts, level, read
from stagescope.agent.host.watched import Watched
from stagescope.samples import Sample

# Where the cgroup of a process has its files, seen from here: cgroup v2 only.
#
# A path in `/proc/PID/cgroup` counts from the root of the reader's cgroup namespace, and the mount
# may show less than that (`cgroup_namespaces(7)`); what lies outside of both is not to be read.


@dataclass(frozen=True, slots=True)
class Mount:
    """The place where the hierarchy of cgroup v2 is mounted."""

    folder: str
    top: str
    """The cgroup that is seen at *folder*."""

    def place(self, cgroup: str) -> str | None:
        """Return the folder of the cgroup *cgroup*.

        None where it is outside of what is mounted, and for the one that holds the whole host:
        it has no limits, and the host's own figures cover what it used.
        """
        top = self.top.rstrip("/")
        if ".." in cgroup.split("/") or not f"{cgroup}/".startswith(f"{top}/"):
            return None
        folder = (self.folder + cgroup.removeprefix(top)).rstrip("/")
        # Every cgroup but the outermost has this file.
        return folder if os.path.exists(f"{folder}/cgroup.events") else None

    def above(self, cgroup: str) -> list[str]:
        """Return the cgroups around *cgroup*, innermost first, up to the one that is mounted."""
        found = []
        while len(cgroup) > len(self.top.rstrip("/")) + 1:
            cgroup = os.path.dirname(cgroup)
            found.append(cgroup)
        return found


def find_mount(proc: str, root: str = "") -> Mount | None:
    """Find it in *proc*; None on a host with cgroup v1 alone. *root* is the folder of `/sys`."""
    for line in (read(f"{proc}/self/mountinfo") or b"").decode(errors="replace").splitlines():
        fields, _, kind = line.partition(" - ")
        words = fields.split(" ")
        if kind.startswith("cgroup2 ") and len(words) > 4:
            return Mount(root + words[4].replace("\\040", " "), words[3])
    return None


def cgroup_of(proc: str, pid: int | str) -> str | None:
    """Return the cgroup of a process; None where it is unknown."""
    for line in (read(f"{proc}/{pid}/cgroup") or b"").decode(errors="replace").splitlines():
        if line.startswith("0::/"):
            return line[3:].removesuffix(" (deleted)")
    return None


LOOK_AGAIN = 10
"""Limits, and who is in which cgroup, are read again at one reading in so many."""

_CPU = (
    ("usage_usec", "stagescope.cgroup.cpu.time", 1e-6),
    ("throttled_usec", "stagescope.cgroup.cpu.throttled_time", 1e-6),
    ("nr_throttled", "stagescope.cgroup.cpu.throttled_periods", 1.0),
)
_MEMORY = (
    ("max", "stagescope.cgroup.memory.limit_hits", 1.0),
    ("oom", "stagescope.cgroup.memory.oom", 1.0),
    ("oom_kill", "stagescope.cgroup.memory.oom_kill", 1.0),
)


class Cgroup:
    """One cgroup and its last reading."""

    def __init__(self, path: str, folder: str) -> None:
        self.path = path
        self._folder = folder
        self._pressure = cgroup_pressure(folder, path)
        self._growth = Growth()
        self._cpu = {key: Counter(name, path, unit) for key, name, unit in _CPU}
        self._memory = {key: Counter(name, path, unit) for key, name, unit in _MEMORY}
        self._limits: dict[str, float] = {}

    def look(self) -> None:
        """Read what it is allowed."""
        found = {
            "stagescope.cgroup.cpu.limit": cores(read(f"{self._folder}/cpu.max")),
            "stagescope.cgroup.memory.limit": count(read(f"{self._folder}/memory.max")),
        }
        self._limits = {name: limit for name, limit in found.items() if limit is not None}

    @property
    def limited(self) -> bool:
        """True where it is allowed less than the host has."""
        return bool(self._limits)

    def read(self, now_ns: int) -> Iterator[Sample]:
        """Read its files at *now_ns*."""
        for name, limit in self._limits.items():
            yield level(name, now_ns, limit, detail=self.path)
        used = count(read(f"{self._folder}/memory.current"))
        if used is not None:
            yield level("stagescope.cgroup.memory.usage", now_ns, used, detail=self.path)
        read_now = _chosen(self._cpu, read(f"{self._folder}/cpu.stat"))
        read_now |= _chosen(self._memory, read(f"{self._folder}/memory.events"))
        yield from self._growth.since(now_ns, read_now | self._pressure.read())


def _chosen(counters: dict[str, Counter], text: bytes | None) -> dict[Counter, int]:
    found = counts(text)
    return {counter: found[key] for key, counter in counters.items() if key in found}


def cores(text: bytes | None) -> float | None:
    """Read `cpu.max`: a quota of µs or `max`, and the period of µs that it is for."""
    words = (text or b"").split()
    quota, period = (count(word) for word in words) if len(words) == 2 else (None, None)
    return quota / period if quota is not None and period else None


class Cgroups:
    """The cgroups of all watched processes, and those around them that have limits."""

    def __init__(self, root: str, clock: Callable[[], int]) -> None:
        self._mount = find_mount(f"{root}/proc", root)
        self._proc = f"{root}/proc"
        self._clock = clock
        self._readings = 0
        self._seen: set[Watched] = set()
        self._of: dict[Watched, str] = {}
        self._cgroups: dict[str, Cgroup] = {}

    def read(self, watched: Sequence[Watched]) -> Iterator[Sample]:
        """Read the cgroups of *watched*, each once, and say which process is in which."""
        if self._mount is None:
            return
        if self._readings % LOOK_AGAIN == 0 or not self._seen.issuperset(watched):
            self._look(self._mount, watched)
        self._readings += 1
        for cgroup in self._cgroups.values():
            yield from cgroup.read(self._clock())
        now_ns = self._clock()
        for one in watched:
            if one in self._of:
                yield level("stagescope.process.cgroup", now_ns, 1, one.pid, self._of[one])

    def _look(self, mount: Mount, watched: Sequence[Watched]) -> None:
        self._seen = set(watched)
        self._of = {}
        found: dict[str, Cgroup] = {}
        for one in watched:
            path = cgroup_of(self._proc, one.here)
            if path and (cgroup := found.get(path) or self._open(mount, path)):
                self._of[one] = path
                found[path] = cgroup
                found |= self._limited(mount, path)
        self._cgroups = found

    def _limited(self, mount: Mount, path: str) -> dict[str, Cgroup]:
        """Return the cgroups around *path* that have limits: they hold for it too."""
        around = {outer: self._open(mount, outer) for outer in mount.above(path)}
        return {outer: cgroup for outer, cgroup in around.items() if cgroup and cgroup.limited}

    def _open(self, mount: Mount, path: str) -> Cgroup | None:
        folder = mount.place(path)
        if folder is None:
            return None
        cgroup = self._cgroups.get(path) or Cgroup(path, folder)
        cgroup.look()
        return cgroup
