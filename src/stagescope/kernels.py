"""Kernels: what a capture saw a device (or, on a CPU, an operator) do, by stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from stagescope.columns import HOST_CLOCK, column


@dataclass(frozen=True, slots=True)
class CaptureRequest:
    """What to capture: the question that a served process's probe is asked."""

    batches: int = 3
    seconds: float = 10.0
    """How long to wait for traffic, and how long to record, at most each."""
    deep: bool = False
    """Operators too where there is a device; without one there are only operators."""
    max_events: int = 20_000
    force: bool = False
    """Also right after another capture of the same process."""
    device_only: bool = False
    """Only where the process works on a device."""
    background: bool = False
    """One of an agent's duty cycle: it keeps its own pace, and takes no turn from people."""
    capture_id: str = ""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One kernel, copy or operator by name in one stage of one capture; or a stage's own row.

    A row of kind `stage` sums its stage up: its `busy_ns` is the union of all device work in it.
    """

    capture_id: str = field(metadata=column("the capture that saw it"))
    pid: int = field(metadata=column("process id"))
    start_ns: int = field(metadata=column(f"begin of recording; {HOST_CLOCK}"))
    end_ns: int = field(metadata=column("its end"))
    stage: str = field(metadata=column("full name of the stage that launched it; empty: none"))
    kind: str = field(metadata=column("`stage`, `kernel`, `copy`, `memset` or `operator` (CPU)"))
    name: str = field(metadata=column("as the profiler writes it; empty for kind `stage`"))
    device: str = field(metadata=column("`cuda:0`, `cpu`"))
    launches: int = field(metadata=column("how often"))
    busy_ns: int = field(
        metadata=column("sum over launches; of a stage the union; of operators self time")
    )
    span_ns: int = field(metadata=column("kind `stage`: how long the stage was open; else 0"))
    idle_ns: int = field(
        metadata=column("kind `stage`: of span_ns, how long the device had no work; else 0")
    )
    host_wait_ns: int = field(
        metadata=column(
            "kind `stage`: of idle_ns, how long the next launch had not begun when the last work "
            "ended; else 0"
        )
    )
    """HTA's host wait, `hta/analyzers/breakdown_analysis.py`."""
    bound: str = field(
        metadata=column(
            "kind `stage`: `launch`, `kernel`, `copy`, `sync`, `mixed`; empty: cannot be told"
        )
    )
    unmatched: int = field(
        metadata=column("kind `stage`: launches whose work was not seen; else 0")
    )
