"""A folder that looks like the root of a host, for what reads `/proc`, `/sys` and cgroups."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from stagescope.records import Anchor, InstrumentCost, Process

PID = 4242
CGROUP = "/pods/server"

_STAT = (
    "{pid} (a (b) c) S {parent} 1 1 0 -1 4194560 {minor} 0 {major} 0 {user} {system} 0 0 20 0 "
    "{threads} 0 {start} 1000000 {pages} 18446744073709551615 1 1 0 0 0 0 0 0 0 0 0 0 17 1"
)


def stat_line(
    *, pid: int = PID, parent: int = 1, user: int = 100, system: int = 50, start: int = 777
) -> str:
    """Return `/proc/PID/stat` of a process with an awkward name."""
    return _STAT.format(
        pid=pid, parent=parent, minor=1000, major=3, user=user, system=system,
        threads=2, start=start, pages=2560,
    )  # fmt: skip


def pressure_text(some_us: int, full_us: int) -> str:
    """Return a pressure file."""
    return (
        f"some avg10=1.00 avg60=0.00 avg300=0.00 total={some_us}\n"
        f"full avg10=0.00 avg60=0.00 avg300=0.00 total={full_us}\n"
    )


def host_files() -> dict[str, str]:
    """Return the files of a host with one served process, in a cgroup with limits."""
    task = "voluntary_ctxt_switches:\t{}\nnonvoluntary_ctxt_switches:\t{}\n"
    group = f"sys/fs/cgroup{CGROUP}"
    return {
        "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n",
        "proc/pressure/cpu": pressure_text(1_000_000, 0),
        "proc/pressure/memory": pressure_text(2_000_000, 500_000),
        f"proc/{PID}/stat": stat_line(),
        f"proc/{PID}/status": f"Name:\tpython\nNSpid:\t{PID}\nThreads:\t2\n",
        f"proc/{PID}/io": "rchar: 1\nwchar: 2\nread_bytes: 4096\nwrite_bytes: 8192\n",
        f"proc/{PID}/maps": "7f00-7f01 rw-s 00000000 00:00 5   /spool/planted.ring\n",
        f"proc/{PID}/smaps_rollup": (
            "5500-7fff ---p 00000000 00:00 0    [rollup]\nRss:   10240 kB\nPss:    5120 kB\n"
            "Private_Clean:  1024 kB\nPrivate_Dirty:  2048 kB\nSwapPss:    0 kB\n"
        ),
        f"proc/{PID}/cgroup": f"1:name=systemd:/\n0::{CGROUP}\n",
        f"proc/{PID}/task/{PID}/status": task.format(10, 1),
        f"proc/{PID}/task/4243/status": task.format(20, 2),
        f"proc/{PID}/fd/0": "",
        f"proc/{PID}/fd/1": "",
        "sys/fs/cgroup/pods/cgroup.events": "populated 1\n",
        f"{group}/cgroup.events": "populated 1\n",
        f"{group}/cpu.max": "150000 100000\n",
        f"{group}/cpu.stat": "usage_usec 5000000\nnr_throttled 3\nthrottled_usec 250000\n",
        f"{group}/memory.max": "1073741824\n",
        f"{group}/memory.current": "536870912\n",
        f"{group}/memory.events": "low 0\nhigh 0\nmax 5\noom 1\noom_kill 1\n",
        f"{group}/cpu.pressure": pressure_text(3_000_000, 1_000_000),
    }


def plant(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Write *files*, named from *root* on."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text if isinstance(text, bytes) else text.encode())


def served(pid: int = PID) -> Process:
    """Return a process as its recorder file tells of it."""
    return Process(
        "0" * 32, pid, "test", "host", "boot", Anchor(0, 0), InstrumentCost(0, 0), "0", "3.11"
    )
