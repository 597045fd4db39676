"""May another process's stacks be read from outside, and if not, which grant is missing?

ptrace(2), "Ptrace access mode checking"; Yama: Linux, Documentation/admin-guide/LSM/Yama.rst.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Final

from stagescope.agent.doctor.finding import OK, STACKS, WARN, Finding
from stagescope.agent.doctor.surroundings import Environment

CAP_SYS_PTRACE: Final = 19
CONTAINER_FILES: Final = {".dockerenv": "docker", "run/.containerenv": "podman"}


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
        """Say what stands in the way; empty: nothing."""
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
        """Give what mends it: the first suffices, the others are other ways."""
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


def ptrace(around: Environment) -> Finding:
    """By the rules: may py-spy read the served processes?"""
    found = [rights(around, pid) for pid in around.pids()] or [rights(around)]
    first = found[0]
    facts = {
        "yama_ptrace_scope": first.yama,
        "cap_sys_ptrace": first.capable,
        "container": first.container,
        "uid": first.me,
        "owners": [one.owner for one in found if one.owner is not None],
        "same_pid_namespace": all(one.same_namespace for one in found),
    }
    scope = "no Yama" if first.yama is None else f"kernel.yama.ptrace_scope {first.yama}"
    held = "CAP_SYS_PTRACE held" if first.capable else "no CAP_SYS_PTRACE"
    worst = max(found, key=lambda one: len(one.obstacles()))
    if not worst.obstacles():
        whom = "any process" if first.capable else "processes of your own"
        return Finding(OK, f"{scope}, {held}: py-spy may read {whom}", facts=facts)
    text = f"py-spy may not read the server: {'; '.join(worst.obstacles())}"
    return Finding(WARN, text, tuple(worst.grants()), lacks=(STACKS,), facts=facts)


def rights(around: Environment, pid: int = 0) -> Rights:
    """Read what decides, for *pid* or (0) for a process of our own user and namespace."""
    scope = around.read(around.proc / "sys/kernel/yama/ptrace_scope")
    held = int(around.status("self", "CapEff") or "0", 16)
    known = Rights(
        int(scope) if scope.isdigit() else None,
        bool(held >> CAP_SYS_PTRACE & 1),
        _container(around),
        me=os.geteuid(),
    )
    if not pid:
        return known
    owner = around.status(pid, "Uid").split()
    mine, its = around.status("self", "NSpid").split(), around.status(pid, "NSpid").split()
    return Rights(
        known.yama,
        known.capable,
        known.container,
        int(owner[0]) if owner else None,
        known.me,
        len(mine) == len(its),
        _asks_leave(around, pid),
    )


def _asks_leave(around: Environment, pid: int) -> bool:
    # An old stagescope in the server has no such op, and a process that is not served no probe.
    from stagescope.agent.doctor.serving import hello

    answers = [hello(one) for one in around.served if one.process.pid == pid]
    return any("allow_ptrace" in answer.get("ops", ()) for answer in answers)


def _container(around: Environment) -> str:
    if "KUBERNETES_SERVICE_HOST" in around.environment:
        return "kubernetes"
    root = around.proc.parent
    return next((name for file, name in CONTAINER_FILES.items() if (root / file).exists()), "")
