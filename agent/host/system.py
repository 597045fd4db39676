"""What the host as a whole did: its cores, memory, network and disks, by psutil."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator
from typing import Any

import psutil

from stagescope.agent.host.proc import Counter, Growth, level
from stagescope.agent.log_once import LogOnce
from stagescope.samples import Sample

MILLI = 1e-3
CPU = {
    mode: Counter("system.cpu.time", mode, MILLI)
    for mode in ("user", "nice", "system", "idle", "iowait", "interrupt", "steal")
}
RECEIVED = Counter("system.network.io", "receive")
SENT = Counter("system.network.io", "transmit")
READ = Counter("system.disk.io", "read")
WRITTEN = Counter("system.disk.io", "write")

_FAILURES = (
    OSError, psutil.Error, RuntimeError, ValueError, LookupError, AttributeError, TypeError,
    ArithmeticError,
)  # fmt: skip
"""What psutil raises where a system hides a thing from it, or writes it as it does not know."""


class System:
    """The host and its last reading."""

    def __init__(self, clock: Callable[[], int], sys: str = "/sys") -> None:
        """*sys* is the folder `/sys`, by which real devices differ from virtual ones."""
        self._clock = clock
        self._sys = sys
        self._growth = Growth()
        self._busy = Busy()
        self._log = LogOnce(level=logging.INFO)
        self._physical: dict[str, bool] = {}
        self._readings = {
            "cores": self._cpu,
            "memory": self._memory,
            "load": self._load,
            "network": self._network,
            "disks": self._disks,
        }

    def read(self) -> list[Sample]:
        """Read all that is there; that something fails is logged once."""
        found: list[Sample] = []
        for name, reading in self._readings.items():
            try:
                found += reading(self._clock())
            except _FAILURES as problem:
                self._log(f"the host's {name} cannot be read here: {problem!r}", about=name)
        return found

    def _cpu(self, now_ns: int) -> Iterator[Sample]:
        times: Any = psutil.cpu_times()  # which modes there are depends on the system
        spent = {
            "user": times.user,
            "nice": getattr(times, "nice", None),
            "system": times.system,
            "idle": times.idle,
            "iowait": getattr(times, "iowait", None),
            "interrupt": _sum(getattr(times, "irq", None), getattr(times, "softirq", None)),
            "steal": getattr(times, "steal", None),
        }
        read = {CPU[mode]: round(s / MILLI) for mode, s in spent.items() if s is not None}
        yield from self._growth.since(now_ns, read)
        yield from self._busy.since(now_ns, read)

    def _memory(self, now_ns: int) -> Iterator[Sample]:
        memory = psutil.virtual_memory()
        used = memory.total - memory.available
        yield level("system.memory.usage", now_ns, used, detail="used")
        yield level("system.memory.linux.available", now_ns, memory.available)
        yield level("system.memory.limit", now_ns, memory.total)

    def _load(self, now_ns: int) -> Iterator[Sample]:
        yield level("stagescope.system.load", now_ns, os.getloadavg()[0])

    def _network(self, now_ns: int) -> Iterator[Sample]:
        cards = psutil.net_io_counters(pernic=True, nowrap=False)
        real = [card for card in cards if self._is_real("class/net", card)]
        # In a container the only card is a virtual one.
        names = real or [card for card in cards if card != "lo"]
        if names:
            read = {
                RECEIVED: sum(cards[name].bytes_recv for name in names),
                SENT: sum(cards[name].bytes_sent for name in names),
            }
            yield from self._growth.since(now_ns, read)

    def _disks(self, now_ns: int) -> Iterator[Sample]:
        disks = psutil.disk_io_counters(perdisk=True, nowrap=False) or {}
        # Partitions and what lies on other disks (RAID, encryption) would count twice.
        real = [disk for disk in disks.items() if self._is_real("block", disk[0])]
        if real:
            read = {
                READ: sum(disk.read_bytes for _, disk in real),
                WRITTEN: sum(disk.write_bytes for _, disk in real),
            }
            yield from self._growth.since(now_ns, read)

    def _is_real(self, kind: str, name: str) -> bool:
        """Return whether there is a device behind a name; asked once for each."""
        known = self._physical.get(name)
        if known is None:
            known = self._physical[name] = os.path.exists(f"{self._sys}/{kind}/{name}/device")
        return known


class Busy:
    """The share of all cores' time in which they ran something."""

    def __init__(self) -> None:
        self._last: tuple[int, int, int] | None = None

    def since(self, now_ns: int, spent: dict[Counter, int]) -> Iterator[Sample]:
        """Yield it from the last reading to this one; time stolen by other guests is in it."""
        total = sum(spent.values())
        idle = spent[CPU["idle"]] + spent.get(CPU["iowait"], 0)
        before, self._last = self._last, (now_ns, total, idle)
        if before and total > before[1] and now_ns > before[0]:
            share = 1 - (idle - before[2]) / (total - before[1])
            yield Sample("system.cpu.utilization", before[0], now_ns, min(1.0, max(0.0, share)))


def _sum(*parts: float | None) -> float | None:
    known = [part for part in parts if part is not None]
    return sum(known) if known else None
