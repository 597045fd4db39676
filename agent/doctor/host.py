"""Which figures of host and processes can be read: psutil, /proc, control groups, pressure, clock."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, Final

from stagescope.agent.doctor.environment import Environment
from stagescope.agent.doctor.finding import HOST, NO, OK, WARN, Finding
from stagescope.agent.host.cgroups import Mount, cgroup_of, cores, find_mount
from stagescope.agent.host.proc import count, read

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
    quotas = [cores(read(f"{folder}/cpu.max")) for folder in _groups(around)]
    quota = min([one for one in quotas if one is not None], default=None)
    facts = {"online": os.cpu_count(), "allowed": allowed, "quota": quota}
    text = f"{allowed} of {facts['online']} CPUs"
    if quota is not None and quota < allowed:
        told = f"{text}, but a quota of {quota:g}: bursts are throttled, and the report says when"
        return Finding(WARN, told, ("raise the CPU limit of the container",), facts=facts)
    return Finding(OK, f"{text}, no quota", facts=facts)


def _mount(around: Environment) -> Mount | None:
    return find_mount(str(around.proc), str(around.sys.parent).rstrip("/"))


def _groups(around: Environment) -> list[str]:
    """Return the folders of our control group and of those around it, innermost first."""
    mount, own = _mount(around), cgroup_of(str(around.proc), "self")
    if mount is None or own is None:
        return []
    return [folder for one in (own, *mount.above(own)) if (folder := mount.place(one))]


def cgroup(around: Environment) -> Finding:
    """Are control groups of version 2 there, with memory and CPU in them?"""
    mount = _mount(around)
    facts: dict[str, Any] = {"mount": mount.folder if mount else None, "controllers": []}
    unified = ("boot with systemd.unified_cgroup_hierarchy=1",)
    if not mount:
        return Finding(WARN, "no cgroup v2: no limits, throttling or OOM counts of containers",
                       unified, facts=facts)  # fmt: skip
    facts["controllers"] = around.read(Path(mount.folder, "cgroup.controllers")).split()
    lacking = [name for name in ("cpu", "memory") if name not in facts["controllers"]]
    if lacking:
        told = f"cgroup v2 has no {' and no '.join(lacking)} here (version 1 holds them): no "
        return Finding(WARN, told + "limits, throttling or OOM counts", unified, facts=facts)
    limits = [count(read(f"{folder}/memory.max")) for folder in _groups(around)]
    limit = min([one for one in limits if one is not None], default=None)
    facts["memory_max_bytes"] = limit
    most = "no memory limit" if limit is None else f"memory limit {limit / 1e9:.1f} GB"
    return Finding(OK, f"v2: throttling and OOM counts of containers; {most}", facts=facts)


def pressure(around: Environment) -> Finding:
    """Does the kernel report for how long work waited for CPU, memory and disk (PSI)?"""
    # With psi=0 the files are there, and reading them fails.
    names = [
        name for name in ("cpu", "memory", "io") if around.read(around.proc / "pressure" / name)
    ]
    facts = {"resources": names}
    if len(names) == 3:
        return Finding(OK, "PSI: how long work waited for CPU, memory and disk", facts=facts)
    text = (
        f"PSI covers {', '.join(names) or 'nothing'}: it is off in this kernel, or older than 4.20"
    )
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
