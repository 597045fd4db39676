"""Kernels: what a capture saw a device (or, on a CPU, an operator) do, by stage."""

from __future__ import annotations

from dataclasses import dataclass


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

    capture_id: str
    pid: int
    start_ns: int
    """The capture's recording, monotonic."""
    end_ns: int
    stage: str
    """Full name; empty for work that no stage launched."""
    kind: str
    """`stage`, `kernel`, `copy`, `memset` or `operator` (CPU)."""
    name: str
    """As the profiler writes it; of a row of kind `stage`, empty."""
    device: str
    """`cuda:0`, `cpu`."""
    launches: int
    busy_ns: int
    """Sum over launches (kind `stage`: union); operators: self time."""
    span_ns: int
    """Kind `stage`: how long the stage was open in the capture; else 0."""
    idle_ns: int
    """Kind `stage`: of span_ns, how long the device had nothing to do; else 0."""
    host_wait_ns: int
    """Kind `stage`: of idle_ns, how long the next launch had not begun when the last work ended
    (HTA's host wait, `hta/analyzers/breakdown_analysis.py`); else 0."""
    bound: str
    """Kind `stage`: `launch`, `kernel`, `copy`, `sync`, `mixed`, or empty where it cannot be told."""
    unmatched: int
    """Kind `stage`: launches whose work was not seen; else 0."""
