"""The verdict on a run, and the evidence that it is drawn from: what travels, no logic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

CLIENT: Final = "client"
NETWORK: Final = "network"
EVENT_LOOP: Final = "event-loop"
THREADPOOL: Final = "threadpool"
GIL: Final = "gil"
CPU: Final = "cpu"
DEPENDENCY: Final = "dependency"
BATCHING: Final = "batching"
MODEL_CAPACITY: Final = "model-capacity"
GPU_COMPUTE: Final = "gpu-compute"
GPU_LAUNCH: Final = "gpu-launch"
GPU_COPY: Final = "gpu-copy"
GPU_MEMORY: Final = "gpu-memory"
SLOW_READER: Final = "slow-reader"
GC: Final = "gc"
MEMORY: Final = "memory"
HOST: Final = "host"
COLD_START: Final = "cold-start"
ERRORS: Final = "errors"
WORKLOAD: Final = "workload"
INSTRUMENTATION: Final = "instrumentation"
NONE: Final = "none"
UNDETERMINED: Final = "undetermined"

CAUSES: Final = (
    CLIENT, NETWORK, EVENT_LOOP, THREADPOOL, GIL, CPU, DEPENDENCY, BATCHING, MODEL_CAPACITY,
    GPU_COMPUTE, GPU_LAUNCH, GPU_COPY, GPU_MEMORY, SLOW_READER, GC, MEMORY, HOST, COLD_START,
    ERRORS, WORKLOAD, INSTRUMENTATION,
)  # fmt: skip
"""What can hold a server back."""
KINDS: Final = (*CAUSES, NONE, UNDETERMINED)
"""All that a verdict may be, a section of docs/verdicts.md each."""

HOLDS: Final = "holds"
CONTRIBUTING: Final = "contributing"
RULED_OUT: Final = "ruled out"
UNTESTABLE: Final = "untestable"
STATUSES: Final = (HOLDS, CONTRIBUTING, RULED_OUT, UNTESTABLE)

HIGH: Final = "high"
MEDIUM: Final = "medium"
LOW: Final = "low"


@dataclass(frozen=True, slots=True)
class StageFacts:
    """One stage of the server, as the run's requests met it; ms are means a request."""

    name: str
    mean_ms: float
    own_ms: float
    """Its waits taken off; equal to `mean_ms` where waits were not measured."""
    own_p50_ms: float
    own_p99_ms: float
    own_slowest_ms: float
    """Mean over the slowest 1 % of requests."""
    waits_ms: Mapping[str, float] = field(default_factory=dict[str, float])
    loop_ms: float | None = None
    """On the event loop; this and the six below are None where waits were not measured."""
    thread_ms: float | None = None
    """In worker threads."""
    computed_ms: float | None = None
    """Of both: on a core."""
    alone_ms: float | None = None
    """Its own time, median, of requests that met no other in it; None where fewer than five did."""
    few_ms: float | None = None
    """The same of the tenth that met fewest others."""
    per_other_ms: float | None = None
    """By how much its own time grows with each other request that is in it already."""
    others: float | None = None
    """How many others a request met in it, on average."""
    open_max: int | None = None
    where: str = ""
    """The line that stack samples saw most, `function (file:line)`; empty: not known."""
    inner: tuple[StageFacts, ...] = ()

    @property
    def idle_ms(self) -> float | None:
        """Its own time in which none of its threads was on a core."""
        return None if self.computed_ms is None else max(0.0, self.own_ms - self.computed_ms)


@dataclass(frozen=True, slots=True)
class WaitFacts:
    """What requests waited for, one cause; as `stagescope.analysis.report.Wait`."""

    cause: str
    mean_ms: float
    p50_ms: float
    p99_ms: float
    slowest_ms: float
    """Mean over the slowest 1 % of requests."""
    low_ms: float
    high_ms: float
    holder: str = ""
    """The stage of other requests that held it most; empty: not known."""
    holder_share: float = 0.0
    where: str = ""


@dataclass(frozen=True, slots=True)
class HostFacts:
    """Cores, memory and our own share of them; None: not sampled."""

    cores: int
    busy_cores: float | None
    """Of the whole host."""
    server_cores: float | None
    """Of the processes that served the run."""
    driver_cores: float | None
    """Of the load driver; None where it ran elsewhere."""
    agent_cores: float | None
    cgroup_limit: float | None
    throttled_share: float | None
    """Of the run's time, in which the server's cgroup was throttled."""
    sampled_share: float
    """How much of the run's time the samples of the host cover."""
    rss_first_bytes: float | None = None
    rss_last_bytes: float | None = None
    leak_bytes_per_s: float | None = None
    major_faults_per_s: float | None = None
    memory_limit_hits: float | None = None
    memory_used_share: float | None = None
    """Of the host, at the most."""


@dataclass(frozen=True, slots=True)
class GpuFacts:
    """What the devices did; shares are of the run's time."""

    busy: float | None
    """Mean over devices, from the driver."""
    bound: str
    """What captures say of most of the time in the stage: `launch`, `kernel`, `copy`, `sync`."""
    stage: str
    device_ms: float | None
    """A request, in that stage."""
    idle_share: float | None
    memory_used_share: float | None
    alloc_retries: float | None
    kernel: str = ""
    """The one with most of the busy time."""


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """Requests of one route, or of one class of size."""

    name: str
    requests: int
    mean_ms: float


@dataclass(frozen=True, slots=True)
class TailRequest:
    """One of the slowest requests, as a waterfall."""

    trace_id: str
    latency_ms: float
    since_start_s: float
    """When it was meant to be sent, since the run's begin."""
    spans: tuple[tuple[str, float, float], ...]
    """Part, begin and length in ms since it was meant to be sent."""
    notes: tuple[str, ...] = ()
    """Its worker, batch, size, and what held it up."""


@dataclass(frozen=True, slots=True)
class Tail:
    """Why the slowest 1 % are slow."""

    requests: int
    mean_ms: float
    reasons: tuple[str, ...]
    """Sentences, the largest difference to the other requests first."""
    exemplars: tuple[TailRequest, ...]


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that rules judge by; one object a run, computed once."""

    valid: bool
    invalid_reasons: tuple[str, ...]
    source: str
    """Where the server's side came from: `agent`, ..., `none`."""
    requests: int
    """Answered, joined and not profiled: what the means are of."""
    answered: int
    failed: int
    bad_status: int
    """Answered with 5xx."""
    rejected: int
    asked_per_s: float | None
    achieved_per_s: float
    seconds: float
    overloaded: bool
    in_flight_middle: int
    in_flight_end: int
    mean_ms: float
    p50_ms: float
    p99_ms: float
    slowest_ms: float
    """Mean over the slowest 1 %."""
    parts: Mapping[str, float]
    """Mean of client wait, connect, network, other, unexplained (ms), their waits taken off.

    And of `network.request` and `network.response`, where one clock tells them apart.
    """
    stages: tuple[StageFacts, ...]
    """Those that were recorded; `other` is the last."""
    waits: tuple[WaitFacts, ...]
    """Empty where they were not measured."""
    one_clock: bool
    loop_busy: float | None
    """Of the busiest event loop, a share of the run's time."""
    loop_starved: float
    """Of the time in which loops ran, or wanted to: they had no core."""
    threads_busy: float | None
    """Worker threads at work, on average."""
    threads_max: int | None
    """Worker threads at work at once, at the most."""
    threads_computing: float | None
    """Cores' worth of computing in worker threads."""
    gc_share: float | None
    """Of the run's time, in which a garbage collection ran."""
    send_wait_ms: float | None
    """Waiting for the client to take bytes."""
    batch_size: float
    batch_max: int
    batches: int
    forming_ms: float
    """For how long requests waited for their batch while no batch was at work, on average."""
    forming_p50_ms: float
    forming_slowest_ms: float
    batch_busy: float | None
    """Share of the run's time in which a batch was at work."""
    host: HostFacts
    gpu: GpuFacts | None
    driver_late_p99_ms: float | None
    driver_cpu_share: float | None
    instrument_us: float | None
    collectors_core_share: float
    cold_ms: float | None
    """Mean latency at the run's begin, where the rest is faster; None: no such begin."""
    cold_requests: int
    routes: tuple[GroupFacts, ...]
    sizes: tuple[GroupFacts, ...]
    """Requests by the size that goes with their latency most, small, middle and large."""
    size_of: str
    """What that size is: `request`, `response`, `tokens`; empty: sizes do not differ."""
    died: int
    errors: Mapping[str, int]
    response_bytes: float = 0.0
    """On average."""

    def stage(self, name: str) -> StageFacts | None:
        """Return the stage called *name*, at any depth."""
        each = (one for outer in self.stages for one in (outer, *outer.inner))
        return next((one for one in each if one.name == name), None)

    def wait(self, cause: str) -> WaitFacts | None:
        """Return what requests waited for *cause*; None where they did not, or nobody measured."""
        return next((one for one in self.waits if one.cause == cause), None)


@dataclass(frozen=True, slots=True)
class Finding:
    """What one rule says of one kind."""

    kind: str
    status: str
    why: str
    """With the number that says so."""
    cost_ms: float = 0.0
    """Of the mean latency."""
    cost_slowest_ms: float = 0.0
    """Of the mean latency of the slowest 1 %."""
    cost_p50_ms: float | None = None
    """Of the median; None: as much of it as of the mean."""
    stage: str = ""
    resource: str = ""
    utilisation: float | None = None
    where: str = ""
    sure: bool = False
    """Measured exactly and by two independent figures."""
    missing: str = ""
    """Of what is untestable: the evidence that lacks, and how to get it."""


@dataclass(frozen=True, slots=True)
class Step:
    """One thing to do, with this run's numbers."""

    text: str
    docs: str
    """Page and section, as `docs/verdicts.md#event-loop`."""


@dataclass(frozen=True, slots=True)
class Rival:
    """Another kind, and why it is not the verdict."""

    kind: str
    status: str
    why: str


@dataclass(frozen=True, slots=True)
class Cost:
    """What it costs; None: cannot be told from this run."""

    p50_ms: float | None = None
    p99_ms: float | None = None
    requests_per_s: float | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What holds the server back."""

    kind: str
    """One of KINDS, or a kind that a rule of the user's own brought."""
    stage: str = ""
    resource: str = ""
    utilisation: float | None = None
    where: str = ""
    confidence: str = LOW
    cost: Cost = field(default_factory=Cost)
    evidence: tuple[str, ...] = ()
    """Sentences, the strongest first; of `undetermined` the first says why."""
    rivals: tuple[Rival, ...] = ()
    untested: tuple[str, ...] = ()
    """Evidence that lacks, each with how to get it."""
    next_steps: tuple[Step, ...] = ()
