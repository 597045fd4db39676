"""Whether this process may read another one's memory, as py-spy does, and which grant is missing.

ptrace(2), "Ptrace access mode checking"; Yama: Documentation/admin-guide/LSM/Yama.rst of Linux.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from stagescope.agent.probe import ask, probe_of
from stagescope.agent.stacks.in_process import Target
from stagescope.errors import StagescopeError

CAP_SYS_PTRACE = 19
YAMA = Path("sys/kernel/yama/ptrace_scope")
ALLOW_S = 0.5


def why_not(target: Target, proc: Path = Path("/proc")) -> str:
    """Say in one sentence why *target* may not be read, and what to grant; empty: it may.

    Where Yama is the only obstacle the process is asked, by its probe, to name us.
    """
    pid = target.pid
    if why := _hidden(target, proc):
        return why
    if _has_capability(proc):
        return ""
    owner = _status(proc / str(pid), "Uid").split()[0]
    if owner != str(os.geteuid()):
        return (
            f"process {pid} belongs to user {owner} and this agent to {os.geteuid()}: run the "
            "agent as that user, or grant it CAP_SYS_PTRACE"
        )
    return _yama(target, _scope(proc), _ask_leave)


def _hidden(target: Target, proc: Path) -> str:
    pid = target.pid
    try:
        fds = proc / str(pid) / "fd"
        files = [_link(fd) for fd in fds.iterdir()]
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


def _link(fd: Path) -> str:
    try:
        return os.readlink(fd)
    except OSError:  # closed meanwhile
        return ""


def _status(process: Path, name: str) -> str:
    try:
        for line in (process / "status").read_text("utf-8", "replace").splitlines():
            key, _, value = line.partition(":")
            if key == name:
                return value.strip()
    except OSError:
        pass
    return "-1"


def _has_capability(proc: Path) -> bool:
    held = int(_status(proc / "self", "CapEff"), 16)
    return held > 0 and bool(held >> CAP_SYS_PTRACE & 1)


def _scope(proc: Path) -> int:
    try:
        return int((proc / YAMA).read_text("ascii"))
    except (OSError, ValueError):  # no Yama
        return 0


def _yama(target: Target, scope: int, ask_leave: Callable[[Target], None]) -> str:
    if scope == 0:
        return ""
    grant = "grant the agent CAP_SYS_PTRACE, or set kernel.yama.ptrace_scope to 0"
    if scope != 1:
        return f"kernel.yama.ptrace_scope is {scope}: {grant}"
    try:
        ask_leave(target)
    except StagescopeError as problem:
        return f"kernel.yama.ptrace_scope is 1, and {problem}: {grant}"
    return ""


def _ask_leave(target: Target) -> None:
    ask(probe_of(target.ring), "allow_ptrace", timeout_s=ALLOW_S, pid=os.getpid())
