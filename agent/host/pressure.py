"""Pressure (PSI): how long tasks waited for cores, memory, storage; of the host and of cgroups.

Format: https://docs.kernel.org/accounting/psi.html. Without psutil: the doctor reads it too.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from stagescope.agent.host.proc import Counter, read

RESOURCES = ("cpu", "memory", "io")
_LINE = re.compile(rb"^(some|full) .*\btotal=(\d{1,19})$", re.MULTILINE)


def totals(text: bytes | None) -> dict[str, int]:
    """Return the totals, in µs, by `some` and `full`."""
    return {kind.decode(): int(total) for kind, total in _LINE.findall(text or b"")}


class Pressure:
    """The pressure files of the host, or of one cgroup."""

    def __init__(self, files: Mapping[str, str], cgroup: str = "") -> None:
        """*files* names the file of each resource; *cgroup* is the path of theirs."""
        self._files = [
            (path, {kind: _counter(resource, kind, cgroup) for kind in ("some", "full")})
            for resource, path in files.items()
        ]

    def read(self) -> dict[Counter, int]:
        """Read the files that are there."""
        return {
            counters[kind]: total
            for path, counters in self._files
            for kind, total in totals(read(path)).items()
        }


def _counter(resource: str, kind: str, cgroup: str) -> Counter:
    return Counter(f"stagescope.pressure.{resource}.{kind}", cgroup, 1e-6)


def host_pressure(proc: str) -> Pressure:
    """Return the host's: of all its tasks, also where *proc* is seen from a container."""
    return Pressure({resource: f"{proc}/pressure/{resource}" for resource in RESOURCES})


def cgroup_pressure(folder: str, cgroup: str) -> Pressure:
    """Return that of the cgroup whose files lie in *folder*."""
    return Pressure({resource: f"{folder}/{resource}.pressure" for resource in RESOURCES}, cgroup)
