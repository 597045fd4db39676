"""`/proc/PID/stat`: of one process, all its threads together, in one line (proc_pid_stat(5))."""

from __future__ import annotations

import os
from dataclasses import dataclass

from stagescope.agent.host.files import read

TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
_FIELDS = 22
"""As many as we need of those behind the name."""


@dataclass(frozen=True, slots=True)
class ProcessStat:
    """What the line holds."""

    parent: int
    minor_faults: int
    major_faults: int
    user_ticks: int
    system_ticks: int
    threads: int
    start_ticks: int
    """Since the host's boot; with the pid it tells a process from all others."""
    resident_pages: int
    """Exact only to a few pages a core: the kernel counts ahead on each of them."""


def parse(text: bytes | None) -> ProcessStat | None:
    """Read the line; None where there is none, or it is not one of a living process."""
    # The name, in brackets, may hold spaces and brackets.
    fields = (text or b"").rpartition(b")")[2].split()
    if len(fields) < _FIELDS or fields[0] in (b"Z", b"X"):
        return None
    wanted = [fields[i] for i in (1, 7, 9, 11, 12, 17, 19, 21)]
    if not all(field.isdigit() and len(field) < 20 for field in wanted):
        return None
    return ProcessStat(*(int(field) for field in wanted))


def process_stat(proc: str, pid: int) -> ProcessStat | None:
    """Read the line of the process *pid* in *proc*, the folder `/proc`."""
    return parse(read(f"{proc}/{pid}/stat"))
