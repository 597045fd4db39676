"""When this process began, on the monotonic clock, as the kernel noted it."""

from __future__ import annotations

import os
import time
from pathlib import Path

STARTTIME_FIELD = 22
"""Of `/proc/PID/stat`, counted from 1 (proc(5)); in clock ticks since boot."""


def process_start_ns(stat: Path = Path("/proc/self/stat")) -> int:
    """Give when this process was forked, monotonic ns; now where the system does not tell.

    The kernel counts in clock ticks, so it is early by up to one (10 ms on Linux), never late.
    """
    now_ns = time.monotonic_ns()
    try:
        # The name, field 2, stands in brackets and may hold anything, brackets too.
        fields = stat.read_bytes().rpartition(b")")[2].split()
        ticks = int(fields[STARTTIME_FIELD - 3])
        since_boot_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - now_ns
    except (OSError, ValueError, IndexError, AttributeError):
        return now_ns
    start_ns = since_boot_ns - asleep_ns
    return start_ns if 0 < start_ns <= now_ns else now_ns
