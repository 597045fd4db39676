"""What the stages of a run used, as the report holds it (docs/report-schema.md, `resources`).

What was not measured is None or empty, never 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

LEAST_SAMPLES = 20
"""Of fewer stack samples no shares are shown."""


@dataclass(frozen=True, slots=True)
class Cpu:
    """CPU time of one stage: a process's CPU time, shared out by its running stack samples."""

    cpu_s: float
    error_s: float
    """One standard error of the share (binomial, Wilson 1927)."""
    samples: int
    """Running stack samples of the stage."""


@dataclass(frozen=True, slots=True)
class TopStack:
    """Stack samples of one stage that were in one place."""

    frame: str
    """`function (file:line)`: the innermost frame outside Python's and other people's packages."""
    leaf: str
    """The innermost function of all, where that is another; else empty."""
    running: bool
    """False where the thread waited there."""
    samples: int
    share: float
    """Of all samples of the stage, waits included."""


@dataclass(frozen=True, slots=True)
class TopKernel:
    """A kernel, copy or operator that a stage launched, all captures of the run together."""

    kind: str
    name: str
    launches: int
    busy_s: float
    share: float
    """Of the busy time of all that the stage launched."""


@dataclass(frozen=True, slots=True)
class Launches:
    """A stage in the run's captures, all together."""

    bound: str
    """`launch`, `kernel`, `copy`, `sync`, `mixed`, or empty; of most of the time open."""
    busy_s: float
    span_s: float
    """How long the stage was open."""
    idle_s: float
    host_wait_s: float
    unmatched: int


@dataclass(frozen=True, slots=True)
class StageUse:
    """What one stage used, and what ran in it."""

    stage: str
    """Full name; `other` for what belongs to no stage."""
    cpu: Cpu | None = None
    device_s: float | None = None
    gpu_busy: float | None = None
    """Mean over devices, a fraction, weighted by the requests in the stage."""
    gpu_coarse: bool = False
    """The stage fills less than half of the windows that the driver reports: what ran beside it
    is in the figure too."""
    gpu_memory_bytes: float | None = None
    """Mean a device, weighted alike."""
    rss_bytes: float | None = None
    """Of the processes that its requests were in, weighted alike."""
    stalls_s: Mapping[str, float] = field(default_factory=dict[str, float])
    """By cause, what its requests were charged while the process stood still."""
    stack_samples: int = 0
    """Stack samples of the stage, waits included: what the shares of `stacks` are of."""
    stacks: tuple[TopStack, ...] = ()
    kernels: tuple[TopKernel, ...] = ()
    launches: Launches | None = None
    sub_stages: tuple[StageUse, ...] = ()
    """Its sub-stages; their figures are in its own."""


@dataclass(frozen=True, slots=True)
class CpuTotal:
    """CPU time of the processes that served the run; the stages and `unsampled_s` sum to it."""

    cpu_s: float
    processes: int
    samples: int
    """Running stack samples, all stages."""
    unsampled_s: float
    """Of processes without a running stack sample."""
    known_by: Mapping[str, int]
    """Running samples by how their stage is known: `marker`, `block`, `interval`, `none`."""
    sampled_by: tuple[str, ...]

    @property
    def shared_out(self) -> bool:
        """False where there are too few samples for shares: no stage has a CPU time then."""
        return self.samples >= LEAST_SAMPLES


@dataclass(frozen=True, slots=True)
class DeviceTotal:
    """Device time of all stages, and how much of the work it was taken of."""

    device_s: float | None
    """None where it is known of batches alone."""
    coverage: float | None
    """Share of the stages' openings that have one, where the sampler counted them, else of the
    batches; None where there were none."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Memory over the run, of the processes that served it, together."""

    rss_first_bytes: float
    rss_last_bytes: float
    slope_bytes_per_s: float | None
    """Of the processes that grew all the time, beyond their scatter (analysis/resources/leak.py); None
    where none did, or the run is too short to tell."""
    alloc_retries: float | None
    """How often torch's allocator had to free its cache and try again."""


@dataclass(frozen=True, slots=True)
class Streams:
    """Times between the chunks (tokens) of streamed responses."""

    requests: int
    gaps: int
    mean_ms: float
    p99_ms: float
    """99th percentile of the requests' own means."""
    max_ms: float


@dataclass(frozen=True, slots=True)
class Collector:
    """What one of the agent's collectors cost."""

    collector: str
    cpu_s: float
    core_share: float
    """Of one core."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What the run's stages used; times of the server's host."""

    window_s: float
    requests: int
    """Requests that began in it."""
    warmup_included: bool
    """True where warm-up could not be told from the rest (no common clock)."""
    stages: tuple[StageUse, ...]
    cpu: CpuTotal | None
    device: DeviceTotal | None
    gpu_window_s: float | None
    """Median length of time that one reading of GPU utilization covers."""
    memory: Memory | None
    streams: Streams | None
    collectors: tuple[Collector, ...]
