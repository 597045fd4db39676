"""Where the cgroup of a process has its files, seen from here: cgroup v2 only.

A path in `/proc/PID/cgroup` counts from the root of the reader's cgroup namespace, and the mount
may show less than that (`cgroup_namespaces(7)`); what lies outside of both is not to be read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from stagescope.agent.host.files import read


@dataclass(frozen=True, slots=True)
class Mount:
    """The place where the hierarchy of cgroup v2 is mounted."""

    folder: str
    top: str
    """The cgroup that is seen at *folder*."""

    def place(self, cgroup: str) -> str | None:
        """Give the folder of the cgroup *cgroup*.

        None where it is outside of what is mounted, and for the one that holds the whole host:
        it has no limits, and what it used the host's own figures tell.
        """
        top = self.top.rstrip("/")
        if ".." in cgroup.split("/") or not f"{cgroup}/".startswith(f"{top}/"):
            return None
        folder = (self.folder + cgroup.removeprefix(top)).rstrip("/")
        # Every cgroup but the outermost has this file.
        return folder if os.path.exists(f"{folder}/cgroup.events") else None

    def above(self, cgroup: str) -> list[str]:
        """Name the cgroups around *cgroup*, innermost first, up to the one that is mounted."""
        found = []
        while len(cgroup) > len(self.top.rstrip("/")) + 1:
            cgroup = os.path.dirname(cgroup)
            found.append(cgroup)
        return found


def find_mount(root: str) -> Mount | None:
    """Find it in `/proc/self/mountinfo` below *root*; None on a host with cgroup v1 alone."""
    for line in (read(f"{root}/proc/self/mountinfo") or b"").decode(errors="replace").splitlines():
        fields, _, kind = line.partition(" - ")
        words = fields.split(" ")
        if kind.startswith("cgroup2 ") and len(words) > 4:
            return Mount(root + words[4].replace("\\040", " "), words[3])
    return None


def cgroup_of(proc: str, pid: int) -> str | None:
    """Name the cgroup of a process; None where it cannot be told."""
    for line in (read(f"{proc}/{pid}/cgroup") or b"").decode(errors="replace").splitlines():
        if line.startswith("0::/"):
            return line[3:].removesuffix(" (deleted)")
    return None
