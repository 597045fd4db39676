"""What an agent's parts may know of it: never the agent itself, which knows all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from stagescope.agent.events import Actions, EventQueue
from stagescope.agent.sinks import Sink
from stagescope.agent.store.recent import RecentRequests
from stagescope.agent.store.telemetry import TelemetryBuffer
from stagescope.records import Process


class Permissions(Protocol):
    """What the agent's budget allows now; see `overhead.Governor`."""

    def allowed(self, what: str) -> bool:
        """Return whether *what* may be done now: `capture`, `micro-capture`, `stacks`, `gpm`."""
        ...

    def stack_rate_factor(self) -> float:
        """Return by what to multiply the rate of stacks: 1, 0.5, or 0 for none."""
        ...


class AgentContext(Protocol):
    """What samplers, triggers, captures and metrics get of an agent."""

    @property
    def spool(self) -> Path:
        """The folder of the recorder files."""
        ...

    @property
    def shared(self) -> bool:
        """True where the agent is a thread of a served process."""
        ...

    @property
    def evidence(self) -> TelemetryBuffer:
        """Where samples, stacks and kernels go."""
        ...

    @property
    def recent(self) -> RecentRequests:
        """The requests that ended in the last seconds."""
        ...

    @property
    def notices(self) -> EventQueue:
        """What was noticed, for triggers."""
        ...

    @property
    def actions(self) -> Actions:
        """What the agent can do when it is asked to look closer."""
        ...

    @property
    def permissions(self) -> Permissions:
        """What may be done now."""
        ...

    @property
    def sinks(self) -> dict[str, Sink]:
        """Who gets all records, by name; a part that wants them adds itself when it is made."""
        ...

    def alive(self) -> Sequence[tuple[Path, Process]]:
        """Return the recorder files whose processes live, and these processes; from any thread."""
        ...

    def loop_ticks(self) -> Sequence[tuple[Path, Process, int, int]]:
        """Return of each live process how often its event loops' timers ran, and how late (ns)."""
        ...

    def serving_since(self, path: Path) -> Sequence[int]:
        """Return the starts (monotonic ns) of the requests that the writer of *path* serves now."""
        ...

    def run_under_way(self) -> bool:
        """Return whether records of a load run came in the last few seconds."""
        ...

    def counters(self) -> Mapping[str, float]:
        """Return its numbers that only grow."""
        ...

    def gauges(self) -> Mapping[str, float]:
        """Return its numbers that come and go."""
        ...

    def costs(self) -> Mapping[str, Mapping[str, float]]:
        """Return what each of its collectors has cost, by name."""
        ...

    def in_flight(self) -> Mapping[str, int]:
        """Return the requests that each service is serving now."""
        ...

    def waits(self) -> Mapping[str, Mapping[str, int]]:
        """Return what the processes of each service waited for."""
        ...
