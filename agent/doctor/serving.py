"""Are requests recorded, and read? Python, the spool, its agent, the served processes."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from stagescope.agent.api.client import AgentClient
from stagescope.agent.api.http_server import SOCKET_PATH_BYTES
from stagescope.agent.doctor.environment import Environment, Served
from stagescope.agent.doctor.finding import NO, OK, SPANS, STACKS, WARN, Finding, plural
from stagescope.agent.lock import held, holder
from stagescope.agent.probe import ask
from stagescope.errors import StagescopeError
from stagescope.identity import own_version
from stagescope.recorder.format import IN_FLIGHT_SLOTS, RING_SLOTS, file_bytes
from stagescope.recorder.spool import (
    LOCK_NAME,
    SOCKET_NAME,
    SPOOL_VARIABLE,
    affordable_ring_slots,
    default_spool,
    opened_spool,
)

PROBE_S: Final = 1.0
AGENT_S: Final = 1.5
IN_MEMORY: Final = ("tmpfs", "ramfs")


def python(around: Environment) -> Finding:
    """Which Python, which stagescope."""
    facts = {
        "python": platform.python_version(),
        "stagescope": own_version(),
        "path": sys.executable,
    }
    return Finding(OK, f"{facts['python']}, stagescope {facts['stagescope']}", facts=facts)


def spool(around: Environment) -> Finding:
    """Can servers write recorder files there, and can an agent read them?"""
    path = around.spool
    facts: dict[str, Any] = {"path": str(path), "exists": path.exists()}
    another = (f"export {SPOOL_VARIABLE}=/another/folder (servers and agent alike)",)
    where = path if path.exists() else _nearest(path)
    if path.exists() and not path.is_dir():
        return _no_spool(f"{path} is a file, not a folder", another, facts)
    if why := _why_not_written(where):
        whose = f"of uid {where.stat().st_uid}, you are {os.geteuid()}"
        what = "is not writable" if where is path else f"cannot be made in {where}"
        return _no_spool(f"{path} {what} ({why}; {whose})", another, facts)
    if path.exists() and (why := _why_not_safe(path)):
        return _no_spool(why, another, facts)
    room = os.statvfs(where)
    facts["free_bytes"] = free = room.f_bavail * room.f_frsize
    facts["in_memory"] = memory = _file_system(around, where) in IN_MEMORY
    facts["records_per_file"] = slots = affordable_ring_slots(room)
    if not slots:
        text = f"{path} has {free / 1e6:.0f} MB free, which are left to others; nothing is recorded"
        return _no_spool(text, (*another, "docker run --shm-size=1g"), facts)
    if (length := len(os.fsencode(path / SOCKET_NAME))) > SOCKET_PATH_BYTES:
        text = f"{path}/{SOCKET_NAME} is {length} bytes long, a socket may have {SOCKET_PATH_BYTES}"
        return Finding(NO, text, another, gives=(SPANS,), facts=facts)
    kept = "in memory" if memory else "on disk, which sees a write at every request"
    made = "" if facts["exists"] else ", will be made by the first server"
    size = f"a worker's file takes {file_bytes(IN_FLIGHT_SLOTS, slots) / 1e6:.1f} MB"
    if slots < RING_SLOTS:
        size += f" (it holds {slots} requests, not {RING_SLOTS}, since little is free)"
    status, do = (OK, ()) if memory else (WARN, (f"export {SPOOL_VARIABLE}=/dev/shm/stagescope",))
    return Finding(status, f"{path}: {kept}, {free / 1e9:.1f} GB free, {size}{made}", do,
                   gives=(SPANS,), facts=facts)  # fmt: skip


def _why_not_safe(path: Path) -> str:
    try:
        with opened_spool(path):
            return ""
    except StagescopeError as problem:
        return str(problem)


def _no_spool(text: str, do: tuple[str, ...], facts: dict[str, Any]) -> Finding:
    return Finding(NO, text, do, lacks=(SPANS,), forbids=(SPANS,), facts=facts)


def _why_not_written(folder: Path) -> str:
    """Try it, by a file without a name; empty: it works."""
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as problem:
        return problem.strerror or type(problem).__name__
    return ""


def _nearest(path: Path) -> Path:
    return next((one for one in path.parents if one.exists()), Path("/"))


def _file_system(around: Environment, path: Path) -> str:
    """Return the type of the file system of *path*: that of the longest mount point before it."""
    best, kind = "", ""
    for line in around.read(around.proc / "self/mounts").splitlines():
        _, point, found, *_ = line.split(" ")
        if path.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, found
    return kind


def agent(around: Environment) -> Finding:
    """Does an agent drain the spool, and is it of this version?"""
    try:
        found = AgentClient(around.spool / SOCKET_NAME, timeout_s=AGENT_S).health()
    except StagescopeError as problem:
        return _no_answer(around, problem)
    facts = {key: found.get(key) for key in ("kind", "pid", "version", "uptime_s")}
    text = f"{facts['kind']} pid {facts['pid']} answers, up {facts['uptime_s']:.0f} s"
    if facts["version"] != own_version():
        told = f"{text}; its version is {facts['version']}, this one {own_version()}"
        return Finding(WARN, told, ("start it anew from this environment",), facts=facts)
    return Finding(OK, text, facts=facts)


def _no_answer(around: Environment, problem: StagescopeError) -> Finding:
    start = f"{_by_variable(around)}stagescope agent"
    lock = around.spool / LOCK_NAME
    if lock.exists() and not os.access(lock, os.R_OK):
        owner = lock.stat().st_uid
        text = f"the spool's agent is uid {owner}'s, and answers that user alone"
        return Finding(WARN, text, (_as_user(owner),), facts={"kind": None})
    if not held(around.spool):
        text = "none runs on this spool; records wait in the recorder files for one"
        return Finding(WARN, text, (start,), facts={"kind": None})
    who = holder(around.spool)
    text = f"the spool is held by {who.get('kind', 'an agent')} pid {who.get('pid', '?')}, which "
    facts = {"kind": who.get("kind"), "pid": who.get("pid")}
    do = (f"kill {who['pid']}, then {start}",) if "pid" in who else (start,)
    return Finding(NO, text + f"does not answer: {problem}", do, facts=facts)


def _by_variable(around: Environment) -> str:
    return "" if around.spool == default_spool() else f"{SPOOL_VARIABLE}={around.spool} "


def servers(around: Environment) -> Finding:
    """Which processes record here, and does each answer its probe?"""
    if not around.served and around.closed:
        owner = around.closed[0].stat().st_uid
        text = f"{plural(len(around.closed), 'recorder file')} here of uid {owner}, not for you"
        return Finding(WARN, text, (_as_user(owner),), facts={"pids": []})
    if not around.served:
        which = f"process {around.pid} does not record" if around.pid else "no process records"
        start = f"{_by_variable(around)}stagescope run -- YOUR SERVER'S COMMAND"
        add = "app.add_middleware(StageMiddleware), in the server's code"
        return Finding(WARN, f"{which} into this spool", (start, add), facts={"pids": []})
    answers = [(one, hello(one)) for one in around.served]
    facts = {
        "pids": [one.process.pid for one in around.served],
        "processes": [
            _facts(one, answer) | {"environment": _settings(around, one)} for one, answer in answers
        ],
    }
    silent = [one for one, answer in answers if "error" in answer]
    text = "; ".join(_told(one, answer) for one, answer in answers[:4])
    more = f"; and {len(answers) - 4} more" if len(answers) > 4 else ""
    told = f"{plural(len(answers), 'process')}: {text}{more}"
    if not silent:
        return _of_versions(around, told, facts)
    do = ("unset STAGESCOPE_PROBE in the server's environment",)
    if any("within" in str(answer.get("error")) for _, answer in answers):
        do = ("look at its stacks: it does not let another thread run",)
    lacks = (STACKS,) if len(silent) == len(answers) else ()
    gives = () if lacks else (STACKS,)
    return Finding(WARN, told, do, gives=gives, lacks=lacks, facts=facts)


def _of_versions(around: Environment, told: str, facts: dict[str, Any]) -> Finding:
    """All is well, but for servers that run another stagescope than we are."""
    there = {one.process.version for one in around.served}
    if there == {own_version()} or "source" in (*there, own_version()):
        return Finding(OK, told, gives=(STACKS,), facts=facts)
    text = f"{told}; they run stagescope {', '.join(sorted(there))}, this is {own_version()}"
    do = (f"pip install stagescope=={own_version()}, in the servers' environment",)
    return Finding(WARN, text, do, gives=(STACKS,), facts=facts)


def _as_user(owner: int) -> str:
    return "sudo " + (f"-u '#{owner}' " if owner else "") + "stagescope doctor (and the agent too)"


def hello(one: Served) -> dict[str, Any]:
    """Ask a served process for its description; `error` where it does not answer."""
    try:
        return dict(ask(one.probe, "hello", timeout_s=PROBE_S))
    except StagescopeError as problem:
        return {"error": str(problem)}


def _facts(one: Served, answer: dict[str, Any]) -> dict[str, Any]:
    process = one.process
    return {
        "pid": process.pid,
        "service": process.service,
        "python": process.python,
        "stagescope": process.version,
        "probe": answer.get("error", "answers"),
        "torch": answer.get("torch", ""),
        "ops": answer.get("ops", []),
    }


def _settings(around: Environment, one: Served) -> dict[str, str]:
    """Return what the server was started with that is ours to know: other variables hold secrets."""
    known = around.environment_of(one.process.pid)
    return {name: value for name, value in known.items() if name.startswith("STAGESCOPE_")}


def _told(one: Served, answer: dict[str, Any]) -> str:
    process = one.process
    about = f"{process.service} pid {process.pid}, Python {process.python}"
    if "error" in answer:
        return f"{about}, its probe is silent ({answer['error']})"
    return f"{about}, torch {answer['torch']}" if answer.get("torch") else about
