"""Whether this process may read another one's memory, as py-spy does, and which grant is missing.

ptrace(2), "Ptrace access mode checking"; Yama: Documentation/admin-guide/LSM/Yama.rst of Linux.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from stagescope.agent.host.proc import status
from stagescope.agent.probe import ask, probe_of
from stagescope.agent.stacks.in_process import Target
from stagescope.errors import StagescopeError
from stagescope.proc import open_files

CAP_SYS_PTRACE: Final = 19
YAMA = Path("sys/kernel/yama/ptrace_scope")
ALLOW_S = 0.5


@dataclass(frozen=True, slots=True)
class Rights:
    """What decides whether we may read a process."""

    yama: int | None
    """`kernel.yama.ptrace_scope`; None: there is no Yama."""
    capable: bool
    """CAP_SYS_PTRACE is in our effective set."""
    container: str
    """`docker`, `podman`, `kubernetes`, or empty."""
    owner: int | None = None
    """Uid of the process; None: no process is asked about."""
    me: int = 0
    """Our own."""
    same_namespace: bool = True
    """The process sees the PIDs that we see."""
    asks_leave: bool = False
    """It lets us in by `PR_SET_PTRACER` where Yama is 1 (its probe can be asked to)."""

    def obstacles(self) -> list[str]:
        """Return what prevents it; empty: nothing."""
        found: list[str] = []
        if not self.same_namespace:
            found.append("it lives in another PID namespace")
        if self.capable and self.yama != 3:
            return found
        if self.owner not in (None, self.me):
            found.append(f"it belongs to uid {self.owner}, you are {self.me}")
        if self.yama and not (self.yama == 1 and self.asks_leave):
            found.append(f"kernel.yama.ptrace_scope is {self.yama} and CAP_SYS_PTRACE is missing")
        return found

    def grants(self) -> list[str]:
        """Return what mends it: the first suffices, the others are other ways."""
        if not self.obstacles():
            return []
        if self.yama == 3:  # until the next boot nothing can
            return ["set kernel.yama.ptrace_scope=1 in /etc/sysctl.d and reboot: 3 is final"]
        found = [] if self.same_namespace else self._shared_namespace()
        if self.capable:
            return found
        found += self._capability()
        if self.owner not in (None, self.me):
            whose = f"-u '#{self.owner}' " if self.owner else ""
            found.append(f"sudo {whose}stagescope agent (as the server's user)")
        elif self.yama:
            found.append("sudo sysctl kernel.yama.ptrace_scope=0 (on the host)")
        return found

    def _shared_namespace(self) -> list[str]:
        pod = "shareProcessNamespace: true (in the pod's spec)"
        run = "docker run --pid=container:SERVER"
        return [pod] if self.container == "kubernetes" else [run, pod]

    def _capability(self) -> list[str]:
        pod = 'securityContext: {capabilities: {add: ["SYS_PTRACE"]}} (of the agent\'s container)'
        if self.container == "kubernetes":
            return [pod]
        if self.container:
            return [f"{self.container} run --cap-add SYS_PTRACE", pod]
        return ['sudo setcap cap_sys_ptrace+ep "$(command -v py-spy)"']


def read_rights(proc: Path, pid: int = 0, *, container: str = "") -> Rights:
    """Read what decides, for *pid* or (0) for a process of our own user and namespace."""
    try:
        yama = int((proc / YAMA).read_text("ascii"))
    except (OSError, ValueError):
        yama = None
    held = int(status(proc, "self", "CapEff") or "0", 16)
    known = Rights(yama, bool(held >> CAP_SYS_PTRACE & 1), container, me=os.geteuid())
    if not pid:
        return known
    owner = (status(proc, pid, "Uid") or "").split()
    mine, its = ((status(proc, one, "NSpid") or "").split() for one in ("self", pid))
    return replace(
        known, owner=int(owner[0]) if owner else None, same_namespace=len(mine) == len(its)
    )


def why_not(target: Target, proc: Path = Path("/proc")) -> str:
    """Return, in one sentence, why *target* may not be read, and what to grant; empty: it may.

    Where Yama is the only obstacle the process is asked, by its probe, to name us.
    """
    if why := _hidden(target, proc):
        return why
    found = replace(read_rights(proc, target.pid), asks_leave=True)
    refused = ""
    if not found.obstacles() and found.yama == 1 and not found.capable:
        try:
            ask(probe_of(target.ring), "allow_ptrace", timeout_s=ALLOW_S, pid=os.getpid())
        except StagescopeError as problem:
            found, refused = replace(found, asks_leave=False), f", and {problem}"
    obstacles = found.obstacles()
    if not obstacles:
        return ""
    grants = ", or ".join(found.grants())
    return f"process {target.pid} may not be read: {'; '.join(obstacles)}{refused}; do: {grants}"


def _hidden(target: Target, proc: Path) -> str:
    pid = target.pid
    try:
        files = [target for _, target in open_files(proc / str(pid))]
    except FileNotFoundError:
        return f"there is no process {pid} here: {_same_namespace()}"
    except PermissionError:
        return (
            f"process {pid} belongs to another user, or to more rights than this agent has: run "
            "the agent as that user, or grant it CAP_SYS_PTRACE"
        )
    if not any(file.endswith(f"/{target.ring.name}") for file in files):
        return f"process {pid} here is another one than the server: {_same_namespace()}"
    return ""


def _same_namespace() -> str:
    return (
        "it has ended, or lives in another PID namespace; let the agent share it "
        "(`shareProcessNamespace: true` of a pod, `--pid=container:NAME`)"
    )
