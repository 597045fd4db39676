"""The host sampler: once a second, all parts of it; what each reads and costs is in docs/host.md."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path

from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.agent.host.cgroups import Cgroups
from stagescope.agent.host.memory import Add, ProportionalMemory
from stagescope.agent.host.pressure import host_pressure
from stagescope.agent.host.proc import Growth
from stagescope.agent.host.processes import Processes
from stagescope.agent.host.system import System
from stagescope.agent.host.watched import Watch
from stagescope.records import Process

PERIOD_S = 1.0


def make(agent: AgentContext) -> Sequence[Collector]:
    """Make the sampler of *agent*: it fits everywhere, and what is missing somewhere is absent."""
    return [HostSampler(agent.alive, agent.evidence.samples.add)]


class HostSampler:
    """Reads the host, and the processes that serve on it."""

    name = "host"
    period_s = PERIOD_S

    def __init__(
        self,
        alive: Callable[[], Sequence[tuple[Path, Process]]],
        add: Add,
        *,
        root: str = "",
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """*alive* returns who serves, *add* takes the samples; *root*: the folder of `/proc`, `/sys`.

        psutil, which reads the host as a whole, has its own idea of where `/proc` is.
        """
        proc = f"{root}/proc"
        self._add = add
        self._clock = clock
        self._watch = Watch(alive, proc)
        self._processes = Processes(proc, clock)
        self._cgroups = Cgroups(root, clock)
        self._system = System(clock, f"{root}/sys")
        self._pressure = host_pressure(proc)
        self._stalled = Growth()
        self._proportional = ProportionalMemory(proc, add, clock)

    def collect(self) -> None:
        """Read everything once."""
        watched = self._watch.look()
        self._add(
            [
                *self._processes.read(watched),
                *self._system.read(),
                *self._stalled.since(self._clock(), self._pressure.read()),
                *self._cgroups.read(watched),
            ]
        )
        self._proportional.begin(watched)

    def close(self) -> None:
        """End the thread that may be reading."""
        self._proportional.close()
