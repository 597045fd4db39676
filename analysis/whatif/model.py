"""The measured pipeline as the simulation takes it: what each request did, and what it queued for.

Times are milliseconds. A request is a row of works, one after the other; each either takes its
time whatever else happens, or needs the event loop, a thread of a pool, or a place in a batch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LOOP, POOL, BATCH, DELAY = "loop", "pool", "batch", "delay"
"""What a work needs: its process's event loop, a thread, a place in a batch, or nothing."""

Times = tuple[tuple[str, float], ...]
"""Stage and its ms, in order."""


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of a request's way through the server."""

    needs: str
    times: Times = ()
    """Of a batch: none, for it is the batch that takes its time."""
    where: str = ""
    """Name of the pool or of the batcher."""


@dataclass(frozen=True, slots=True)
class Request:
    """One measured request."""

    at_ms: float
    """When the plan said to send it, since the run's beginning."""
    measured: bool
    """False in warm-up."""
    latency_ms: float
    process: int
    works: tuple[Work, ...]
    after_ms: float
    """From the server's end to the client's last byte; below 0 where the client had it earlier."""


@dataclass(frozen=True, slots=True)
class Pool:
    """Threads that work side by side."""

    stages: frozenset[str]
    size: int | None
    """None: no request was seen to wait for one, so how many there are is not known."""
    seen: int
    """How many worked at the same time at most."""


@dataclass(frozen=True, slots=True)
class Formed:
    """One measured batch."""

    at_ms: float
    """When it began to form, as `Request.at_ms`."""
    size: int
    times: Times
    """Without its waiting."""


@dataclass(frozen=True, slots=True)
class Batcher:
    """Forms batches: waits from the first member on, at most for its delay, or until it is full."""

    workers: int
    delay_ms: float
    """What a batch that did not fill up waited, so the timer's lateness is in it."""
    max_size: int | None
    """None: no batch was seen to be closed for being full."""
    largest: int
    turnaround_ms: float
    """From one batch's end to the next one's start where members were there already."""
    batches: tuple[Formed, ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """All that is simulated of one run."""

    requests: tuple[Request, ...]
    processes: int
    pools: Mapping[str, Pool]
    batchers: Mapping[str, Batcher]
    begin_ms: float
    """The measured phase, on the clock of `Request.at_ms`."""
    measured_ms: float
    notes: tuple[str, ...] = ()
    """What is not known of the run and matters for a prediction."""
    scale: Mapping[str, float] = field(default_factory=dict[str, float])
    """Factor of each stage's own time that was changed, and of all below it."""
    shift: Mapping[str, float] = field(default_factory=dict[str, float])
    """Ms that each request (each batch, where the stage is a batch's) takes longer in a stage."""
    spread: bool = False
    """Requests go to any process, not to the one that served them: there are others now."""

    @property
    def stages(self) -> frozenset[str]:
        """Every stage that takes time of its own."""
        names = {name for one in self.requests for work in one.works for name, _ in work.times}
        names |= {
            name for one in self.batchers.values() for b in one.batches for name, _ in b.times
        }
        return frozenset(names)
