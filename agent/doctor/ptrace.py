"""May another process's stacks be read from outside, and if not, which grant is missing?

The rules are in `agent/stacks/permissions.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from stagescope.agent.doctor.environment import Environment
from stagescope.agent.doctor.finding import OK, STACKS, WARN, Finding
from stagescope.agent.stacks.permissions import Rights, read_rights

CONTAINER_FILES: Final = {".dockerenv": "docker", "run/.containerenv": "podman"}


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
    found = read_rights(around.proc, pid, container=_container(around))
    return replace(found, asks_leave=bool(pid) and _asks_leave(around, pid))


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
