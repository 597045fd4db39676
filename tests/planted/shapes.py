"""The planted servers: what is planted in each, at three strengths, and how it is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Strength:
    """How one run plants it."""

    x: float = 1.0
    """What the server is told."""
    rate_per_s: float = 40.0


@dataclass(frozen=True, slots=True)
class Shape:
    """One planted server."""

    name: str
    kinds: frozenset[str]
    """What is right; several where several were planted."""
    stages: frozenset[str]
    """The stages that are right; none: any."""
    strengths: tuple[Strength, ...]
    """Three, or more where healthy."""
    server: str = ""
    """The path, where it is not the name."""
    read_bytes_per_s: tuple[float, ...] = ()
    """By strength; empty: as they come."""
    delays_ms: tuple[float, ...] = ()
    neighbours: tuple[int, ...] = ()
    """Processes that compute beside it, by strength."""
    stops: bool = False
    hogs: tuple[int, ...] = ()
    """Threads that compute in the driver's process, by strength."""
    warm: bool = True
    """Ask it a few times before the run."""

    @property
    def path(self) -> str:
        """The server's path."""
        return self.server or self.name


def _shape(name: str, kind: str, stage: str, *strengths: Strength, **more: object) -> Shape:
    stages = frozenset(stage.split()) if stage else frozenset()
    return Shape(name, frozenset(kind.split()), stages, strengths, **more)  # type: ignore[arg-type]


def _rates(*rates: float, x: float = 1.0) -> tuple[Strength, ...]:
    return tuple(Strength(x, rate) for rate in rates)


def _strong(rate: float, *strengths: float) -> tuple[Strength, ...]:
    return tuple(Strength(x, rate) for x in strengths)


PLANTED = (
    _shape("loop_burn", "event-loop", "preprocess", *_rates(95, 115, 150)),
    _shape("loop_block", "event-loop", "preprocess", *_rates(85, 105, 140)),
    _shape("loop_post", "event-loop", "postprocess", *_rates(85, 105, 140)),
    _shape("loop_model", "event-loop", "inference", *_rates(85, 105, 140)),
    _shape("threads_two", "threadpool", "inference", *_rates(110, 135, 180)),
    _shape("threads_eight", "threadpool", "preprocess", *_rates(115, 135, 180)),
    _shape("gil_model", "gil", "inference", *_rates(95, 115, 140)),
    _shape("gil_preprocess", "gil", "preprocess", *_rates(85, 100, 125)),
    _shape("cpu_model", "cpu", "inference", *_rates(110, 125, 145)),
    _shape("cpu_preprocess", "cpu", "preprocess", *_rates(110, 135, 170)),
    _shape("dep_store", "dependency", "preprocess", *_strong(40, 30, 60, 150)),
    _shape("dep_thread", "dependency", "postprocess", *_strong(40, 30, 60, 150)),
    _shape("dep_tail", "dependency", "preprocess", *_strong(50, 200, 400, 800)),
    _shape("dep_remote", "dependency", "inference", *_strong(40, 30, 60, 150)),
    _shape("batching_delay", "batching", "batch queue", *_strong(40, 30, 60, 120)),
    _shape("batching_async", "batching", "batch queue", *_strong(40, 30, 60, 120)),
    _shape("model_queue", "model-capacity", "inference", *_rates(90, 110, 150)),
    _shape("model_lock", "model-capacity", "inference", *_rates(85, 105, 140)),
    _shape("model_semaphore", "model-capacity", "inference", *_rates(95, 110, 140)),
    _shape("model_thread_lock", "model-capacity", "inference", *_rates(85, 105, 140)),
    _shape("model_batched", "model-capacity", "inference", *_rates(220, 260, 340)),
    _shape(
        "slow_reader", "slow-reader", "respond", *_strong(30, 1, 1, 1), server="big_answer",
        read_bytes_per_s=(60e6, 30e6, 12e6),
    ),
    _shape("gc_each", "gc", "", *_strong(30, 150, 250, 400)),
    _shape("gc_third", "gc", "", *_strong(35, 300, 450, 700)),
    _shape("errors_status", "errors", "", *_strong(50, 12, 30, 70)),
    _shape("errors_raised", "errors", "", *_strong(50, 12, 30, 70)),
    _shape("cold_lazy", "cold-start", "", *_strong(40, 800, 1500, 2500), warm=False),
    _shape("cold_warmup", "cold-start", "", *_strong(50, 60, 120, 250), warm=False),
    _shape("client_hog", "client", "", *_strong(50, 1, 1, 1), server="steady", hogs=(2, 3, 4)),
    _shape("network_delay", "network", "", *_strong(40, 1, 1, 1), server="steady",
           delays_ms=(10, 25, 60)),
    _shape("workload_size", "workload", "", *_strong(50, 2, 4, 8)),
    _shape("workload_loop", "workload", "", *_strong(30, 1, 1.6, 2.5)),
    _shape("host_neighbours", "host", "", *_strong(40, 6, 6, 6), server="steady",
           neighbours=(4, 6, 10)),
    _shape("host_stopped", "host", "", *_strong(60, 1, 1, 1), server="steady", stops=True),
)  # fmt: skip

HEALTHY = (
    _shape("h_fast", "none", "", *_rates(20, 50, 100)),
    _shape("h_steady", "none", "", *_rates(10, 20, 35, x=2), server="steady"),
    _shape("h_native", "none", "", *_rates(10, 20, 30)),
    _shape("h_async", "none", "", *_rates(10, 25, 50)),
    _shape("h_batched", "none", "", *_rates(10, 20, 30)),
)

MIXED = (
    _shape("mix_loop_dep", "event-loop dependency", "preprocess postprocess", *_rates(95, 110, 140)),
    _shape("mix_batch_dep", "batching dependency", "batch queue preprocess", *_strong(40, 30, 60, 120)),
    _shape("mix_lock_loop", "model-capacity event-loop", "inference preprocess", *_rates(85, 100, 120)),
    _shape("mix_errors_loop", "errors event-loop", "", *_rates(95, 110, 140)),
    _shape("mix_gil_threads", "gil threadpool", "inference", *_rates(90, 110, 140)),
)  # fmt: skip
ALL = (*PLANTED, *HEALTHY, *MIXED)
