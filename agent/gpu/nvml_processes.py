"""Whose device memory and time it is: rows by process, where /proc knows the process.

In a container the driver may name PIDs of the host, or nobody. A PID is shown only where this
host's /proc has it; the memory of all others is one row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, Final

from stagescope.agent.gpu.nvml_calls import Calls
from stagescope.agent.gpu.nvml_readings import DeviceReading, Moment
from stagescope.agent.gpu.probe import UNKNOWN_PROCESS, Tier
from stagescope.agent.host.proc import namespace_pids
from stagescope.samples import Sample

NOT_AVAILABLE: Final = (1 << 64) - 1
Resolve = Callable[[int], int]
"""A PID of the driver's to one of ours; 0: nobody's."""


def resolver(served: Callable[[], Collection[int]], proc: Path = Path("/proc")) -> Resolve:
    """Make what finds processes in *proc*; *served* gives the PIDs that records are written under.

    A served process in a container writes the PID that it has there, which is the last of `NSpid`.
    """

    def resolve(pid: int) -> int:
        names = namespace_pids(proc, pid)
        if not names:
            return 0
        known = served()
        return names[-1] if pid not in known and names[-1] in known else pid

    return resolve


class Memory(DeviceReading):
    """Device memory of each process that computes on it, by *call*."""

    tier: Tier = "slow"

    def __init__(
        self, calls: Calls, call: str, handle: object, device: str, resolve: Resolve
    ) -> None:
        self.call = call
        super().__init__(calls, handle, device)
        self._resolve = resolve

    def read(self, at: Moment) -> list[Sample]:
        """List the processes."""
        used: dict[int, int] = defaultdict(int)
        for process in self._calls(self.call, self._handle):
            if process.usedGpuMemory not in (None, NOT_AVAILABLE):
                used[self._resolve(process.pid)] += process.usedGpuMemory
        name, now_ns = "model_server.gpu.process.memory", at.now_ns
        return [_row(name, now_ns, now_ns, used[pid], pid, self._device) for pid in used]


class Utilization(DeviceReading):
    """Share of the time in which kernels of a process ran; the driver samples it by itself."""

    tier: Tier = "slow"
    call = "nvmlDeviceGetProcessUtilization"

    def __init__(self, calls: Calls, handle: object, device: str, resolve: Resolve) -> None:
        super().__init__(calls, handle, device)
        self._resolve = resolve
        self._last_us = 0

    def read(self, at: Moment) -> list[Sample]:
        """Fetch the driver's samples since the last time, and give each process's mean."""
        begun = self._last_us
        found = self._calls(self.call, self._handle, begun)
        news = [one for one in found if one.timeStamp > begun]
        self._last_us = max([begun, *(one.timeStamp for one in news)])
        return self._means(news, at.monotonic_ns(begun), at) if begun else []

    def _means(self, news: Sequence[Any], start_ns: int, at: Moment) -> list[Sample]:
        shares: dict[int, list[int]] = defaultdict(list)
        for one in news:
            shares[self._resolve(one.pid)].append(one.smUtil)
        end_ns = at.monotonic_ns(self._last_us)
        name = "model_server.gpu.process.utilization"
        return [
            _row(name, start_ns, end_ns, sum(each) / len(each) / 100, pid, self._device)
            for pid, each in shares.items()
            if pid  # a mean over several unknown ones would say nothing
        ]


def _row(name: str, start_ns: int, end_ns: int, value: float, pid: int, device: str) -> Sample:
    detail = "" if pid else UNKNOWN_PROCESS
    return Sample(name, start_ns, end_ns, float(value), pid=pid, device=device, detail=detail)
