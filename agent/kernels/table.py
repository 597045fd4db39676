"""The kernel table of a capture: what each stage launched, how busy the device was, what bounds it.

A kernel belongs to the stage whose thread launched it: torch's trace has one correlation id for a
launch and its work, the ledger has the thread's stage at that time. The rules by which a stage
is bound are those of docs/capture.md, after HTA (`hta/analyzers/breakdown_analysis.py`), applied
within the stage alone: else "no traffic" would count as waiting for the host.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from stagescope.agent.kernels.rows import Interval, common, gaps, length, operator_rows, row, union
from stagescope.agent.kernels.trace import CaptureFacts, StageAt, TorchCapture, TraceEvent
from stagescope.kernels import KernelRow
from stagescope.stages import stage_of

LAUNCHES = ("cuda_runtime", "cuda_driver")
WORK = {"kernel": "kernel", "gpu_memcpy": "copy", "gpu_memset": "memset"}
"""torch's categories of a device's work, and ours."""
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")

HOST_WAIT_SHARE = 0.2
BUSY_SHARE = 0.8
COPY_SHARE = 0.15
SYNC_SHARE = 0.2


@dataclass(frozen=True, slots=True)
class KernelTable:
    """The rows, and how sure their stages are."""

    rows: tuple[KernelRow, ...]
    works: int
    """Pieces of work of the device, or operators, in the rows."""
    by_time: int
    """Of these, how many were found by the one inference under way, not by their thread."""
    ambiguous: int
    """And how many by the stage opened last of several that were open on one event loop."""
    nowhere: int
    """And how many that no stage launched."""


@dataclass(frozen=True, slots=True)
class Work:
    """One piece of work of a device, and its launch where that was seen."""

    event: TraceEvent
    launch: TraceEvent | None
    stage: str


def kernel_table(capture: TorchCapture) -> KernelTable:
    """Make the table of *capture*."""
    facts, stage_at = capture.facts, StageAt(capture.openings, capture.aliases)
    how: Counter[str] = Counter()
    launches = [e for e in capture.events if e.category in LAUNCHES and _within(facts, e)]
    works = list(_works(capture, launches, stage_at, how))
    spans = _spans(capture)
    rows: list[KernelRow] = []
    for device in sorted({work.event.device for work in works}):
        own = [work for work in works if work.event.device == device]
        rows += _device_rows(facts, f"cuda:{device}", own, launches, spans, stage_at)
    if facts.operators:
        rows += operator_rows(capture, stage_at, spans, how)
    return KernelTable(
        tuple(rows), how.total(), how["time"], how["ambiguous"], how["none"]
    )  # fmt: skip


def _within(facts: CaptureFacts, event: TraceEvent) -> bool:
    return facts.since_ns <= event.start_ns < facts.until_ns


def _spans(capture: TorchCapture) -> Mapping[str, list[Interval]]:
    """Return when each stage was open, within the window."""
    facts = capture.facts
    open_times: dict[str, list[Interval]] = defaultdict(list)
    for one in capture.openings:
        begin, end = max(one.start_ns, facts.since_ns), min(one.end_ns, facts.until_ns)
        open_times[one.stage].append((begin, end))
    return {stage: union(times) for stage, times in open_times.items()}


def _works(
    capture: TorchCapture, launches: Iterable[TraceEvent], stage_at: StageAt, how: Counter[str]
) -> Iterator[Work]:
    """Yield the device's work that was launched in the window, or whose launch was not seen."""
    everywhere = {e.correlation: e for e in capture.events if e.category in LAUNCHES}
    inside = {launch.correlation for launch in launches}
    for event in capture.events:
        if event.category not in WORK:
            continue
        launch = everywhere.get(event.correlation)
        if launch is None:
            if _within(capture.facts, event):
                how["none"] += 1
                yield Work(event, None, "")
        elif launch.correlation in inside:
            found = stage_at(launch.thread_id, launch.start_ns)
            how[found.how] += 1
            yield Work(event, launch, found.stage)


def _device_rows(
    facts: CaptureFacts,
    device: str,
    works: Sequence[Work],
    launches: Sequence[TraceEvent],
    spans: Mapping[str, list[Interval]],
    stage_at: StageAt,
) -> Iterator[KernelRow]:
    by_stage: dict[str, list[Work]] = defaultdict(list)
    for work in works:
        by_stage[work.stage].append(work)
    launched: dict[str, list[TraceEvent]] = defaultdict(list)
    for launch in launches:
        launched[stage_at(launch.thread_id, launch.start_ns).stage].append(launch)
    idle = Idle(works, facts)
    seen = {work.event.correlation for work in works}
    for stage, own in sorted(by_stage.items()):
        yield _stage_row(
            facts, device, stage, own, launched[stage], spans.get(stage, []), idle, seen
        )
        yield from _named_rows(facts, device, stage, own)


def _named_rows(
    facts: CaptureFacts, device: str, stage: str, works: Iterable[Work]
) -> Iterator[KernelRow]:
    """Yield one row a kernel, copy or memset by name, the longest first."""
    times: dict[tuple[str, str], list[int]] = defaultdict(list)
    for work in works:
        event = work.event
        times[WORK[event.category], event.name].append(event.end_ns - event.start_ns)
    for (kind, name), each in sorted(times.items(), key=lambda pair: -sum(pair[1])):
        yield row(facts, stage, kind, name, device, len(each), sum(each))


def _stage_row(
    facts: CaptureFacts,
    device: str,
    stage: str,
    works: Sequence[Work],
    launches: Sequence[TraceEvent],
    span: list[Interval],
    idle: Idle,
    seen: set[int],
) -> KernelRow:
    busy = union(_stretch(work.event) for work in works)
    unmatched = [
        one for one in launches if "Launch" in one.name and one.correlation not in seen
    ]  # fmt: skip
    idle_ns, host_wait_ns = idle.within(span)
    return row(
        facts, stage, "stage", "", device, len(works), length(busy), span_ns=length(span),
        idle_ns=idle_ns, host_wait_ns=host_wait_ns,
        bound=_bound(stage, works, launches, span, host_wait_ns), unmatched=len(unmatched),
    )  # fmt: skip


class Idle:
    """When a device had nothing to do, and whether it waited for the host."""

    def __init__(self, works: Sequence[Work], facts: CaptureFacts) -> None:
        busy = union(_stretch(work.event) for work in works)
        first = min([facts.since_ns, *[start for start, _ in busy]])
        last = max([facts.until_ns, *[end for _, end in busy]])
        self._gaps = gaps(busy, first, last)
        launched: dict[int, int | None] = {}
        for work in works:
            launched[work.event.start_ns] = work.launch.start_ns if work.launch else None
        # HTA's host wait: the launch of what comes next began after the last work had ended.
        # After the last work of all nothing was launched, which is the host's doing too.
        self._waits = [
            gap for gap in self._gaps
            if gap[1] == last or ((at := launched.get(gap[1])) is not None and at >= gap[0])
        ]  # fmt: skip

    def within(self, span: Sequence[Interval]) -> tuple[int, int]:
        """Return the idle time within *span*, and what of it was waiting for the host; ns."""
        return length(common(self._gaps, span)), length(common(self._waits, span))


def _bound(
    stage: str,
    works: Sequence[Work],
    launches: Sequence[TraceEvent],
    span: Sequence[Interval],
    host_wait_ns: int,
) -> str:
    """Return what limits the stage; empty where that is unknown."""
    whole = length(span)
    kernels = [work.event for work in works if work.event.category == "kernel"]
    if not whole or not works:
        return ""
    busy = union(_stretch(kernel) for kernel in kernels)
    copies = union(_stretch(w.event) for w in works if w.event.category == "gpu_memcpy")
    alone = length(copies) - length(common(copies, busy))
    waits = union(_stretch(one) for one in launches if one.name in SYNCS)
    reasons = {
        "kernel": length(common(busy, span)) > BUSY_SHARE * whole,
        "copy": alone > COPY_SHARE * whole,
        "launch": host_wait_ns > HOST_WAIT_SHARE * whole,
        "sync": stage_of(stage) in ("preprocess", "postprocess")
        and length(common(waits, span)) > SYNC_SHARE * whole,
    }
    if not any(reasons.values()) and kernels:
        reasons["launch"] = _launches_outlast(kernels, launches)
    met = [name for name, is_so in reasons.items() if is_so]
    return met[0] if len(met) == 1 else "mixed"


def _launches_outlast(kernels: Sequence[TraceEvent], launches: Sequence[TraceEvent]) -> bool:
    """Return whether to launch a kernel takes longer than the kernel, by their medians."""
    calls = [one.end_ns - one.start_ns for one in launches if "Launch" in one.name]
    return bool(calls) and median([k.end_ns - k.start_ns for k in kernels]) < median(calls)


def _stretch(event: TraceEvent) -> Interval:
    return event.start_ns, event.end_ns
