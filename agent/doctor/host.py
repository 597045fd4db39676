"""What host and processes tell of themselves: psutil, /proc, control groups, pressure, clock."""

from __future__ import annotations

import os
import time
from typing import Any, Final

from stagescope.agent.doctor.finding import HOST, NO, OK, WARN, Finding
from stagescope.agent.doctor.surroundings import Environment
from stagescope.agent.host.cgroups import cgroup_of

SLOW_CLOCKS: Final = ("hpet", "acpi_pm", "jiffies", "xen")
"""Read by a system call or a device: microseconds a reading."""
CLOCK_READINGS: Final = 2000


def processes(around: Environment) -> Finding:
    """Can processes be read: psutil for all, /proc/PID of those that matter?"""
    try:
        import psutil
    except ImportError:
        text = "psutil is not installed: no figures of host and processes"
        return Finding(NO, text, ("pip install psutil",), lacks=(HOST,), forbids=(HOST,))
    facts: dict[str, Any] = {"psutil": psutil.__version__}
    if not around.read(around.proc / "self/stat"):
        text = f"{around.proc} cannot be read: no figures of host and processes"
        do = ("mount /proc, without hidepid=2",)
        return Finding(NO, text, do, lacks=(HOST,), forbids=(HOST,), facts=facts)
    closed = [pid for pid in around.pids() if not os.access(around.proc / f"{pid}/io", os.R_OK)]
    facts["closed"] = closed
    text = f"psutil {facts['psutil']}: CPU, memory, threads, switches, faults, network"
    if closed:
        told = f"{text}; not the disk traffic of pid {', '.join(map(str, closed[:4]))}"
        do = ("run the agent as the server's user, or with CAP_SYS_PTRACE",)
        return Finding(WARN, told, do, gives=(HOST,), facts=facts)
    return Finding(OK, f"{text}, disk", gives=(HOST,), facts=facts)


def cpus(around: Environment) -> Finding:
    """How much CPU there is for us, and how much we may use of it."""
    allowed = len(os.sched_getaffinity(0))
    quota = _quota(around)
    facts = {"online": os.cpu_count(), "allowed": allowed, "quota": quota}
    text = f"{allowed} of {facts['online']} CPUs"
    if quota is not None and quota < allowed:
        told = f"{text}, but a quota of {quota:g}: bursts are throttled, and the report says when"
        return Finding(WARN, told, ("raise the CPU limit of the container",), facts=facts)
    return Finding(OK, f"{text}, no quota", facts=facts)


def _quota(around: Environment) -> float | None:
    """Return the smallest `cpu.max` on the way from our control group up; None: no limit."""
    mount = _cgroup2(around)
    found: list[float] = []
    path = mount + _group(around)
    while mount and path.startswith(mount):
        limit, _, period = around.read(around.sys / path / "cpu.max").partition(" ")
        if limit.isdigit() and period.isdigit():
            found.append(int(limit) / int(period))
        path = path.rpartition("/")[0]
    return min(found, default=None)


def _cgroup2(around: Environment) -> str:
    """Return where version 2 is mounted, below /sys; empty: nowhere."""
    for line in around.read(around.proc / "self/mounts").splitlines():
        _, point, kind, *_ = line.split(" ")
        if kind == "cgroup2" and point.startswith("/sys/"):
            return point.removeprefix("/sys/")
    return ""


def _group(around: Environment) -> str:
    return (cgroup_of(str(around.proc), "self") or "").rstrip("/")


def cgroup(around: Environment) -> Finding:
    """Are control groups of version 2 there, with memory and CPU in them?"""
    mount = _cgroup2(around)
    facts: dict[str, Any] = {"mount": f"/sys/{mount}" if mount else None, "controllers": []}
    unified = ("boot with systemd.unified_cgroup_hierarchy=1",)
    if not mount:
        return Finding(WARN, "no cgroup v2: no limits, throttling or OOM counts of containers",
                       unified, facts=facts)  # fmt: skip
    facts["controllers"] = around.read(around.sys / mount / "cgroup.controllers").split()
    lacking = [name for name in ("cpu", "memory") if name not in facts["controllers"]]
    if lacking:
        told = f"cgroup v2 has no {' and no '.join(lacking)} here (version 1 holds them): no "
        return Finding(WARN, told + "limits, throttling or OOM counts", unified, facts=facts)
    where = around.sys / (mount + _group(around))
    limit = around.read(where / "memory.max")
    facts["memory_max_bytes"] = int(limit) if limit.isdigit() else None
    most = f"memory limit {int(limit) / 1e9:.1f} GB" if limit.isdigit() else "no memory limit"
    return Finding(OK, f"v2: throttling and OOM counts of containers; {most}", facts=facts)


def pressure(around: Environment) -> Finding:
    """Does the kernel tell for how long work waited for CPU, memory and disk (PSI)?"""
    # With psi=0 the files are there, and reading them fails.
    names = [
        name for name in ("cpu", "memory", "io") if around.read(around.proc / "pressure" / name)
    ]
    facts = {"resources": names}
    if len(names) == 3:
        return Finding(OK, "PSI: how long work waited for CPU, memory and disk", facts=facts)
    text = f"PSI tells {', '.join(names) or 'nothing'}: the kernel has it off, or is before 4.20"
    return Finding(WARN, text, ("boot with psi=1",), facts=facts)


def clock(around: Environment) -> Finding:
    """Is reading the clock cheap? Every stage reads it twice."""
    folder = around.sys / "devices/system/clocksource/clocksource0"
    source = around.read(folder / "current_clocksource") or "unknown"
    begun = time.perf_counter_ns()
    for _ in range(CLOCK_READINGS):
        time.monotonic_ns()
    each_ns = (time.perf_counter_ns() - begun) / CLOCK_READINGS
    facts = {"source": source, "reading_ns": round(each_ns)}
    text = f"{source}, {each_ns:.0f} ns a reading"
    if source not in SLOW_CLOCKS:
        return Finding(OK, text, facts=facts)
    others = around.read(folder / "available_clocksource")
    do = (f"echo tsc | sudo tee {folder}/current_clocksource",) if "tsc" in others.split() else ()
    return Finding(WARN, f"{text}: each stage costs the server that twice", do, facts=facts)
