"""What a capture left in its folder, read back: torch's trace and the ledger, on one clock.

torch writes Chrome's trace format, https://github.com/google/perfetto/blob/main/docs/reference/
(times are µs from `baseTimeNanoseconds`, Unix time); the ledger has monotonic times and pairs of
both clocks. Everything here is monotonic, like all of a record's times.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from stagescope.errors import StagescopeError
from stagescope.stages import opened_last, stage_of

TRACE_NAME = "torch.json"
LEDGER_NAME = "ledger.json"


class Opening(NamedTuple):
    """A stage that one thread of the served process opened."""

    stage: str
    thread_id: int
    start_ns: int
    end_ns: int
    trace_id: str
    span_id: str
    kind: str
    """`request`, `batch`, or `members` (of a batch, all together)."""


class TraceEvent(NamedTuple):
    """One complete event of torch's trace."""

    category: str
    """`cpu_op`, `cuda_runtime`, `cuda_driver`, `kernel`, `gpu_memcpy`, `gpu_memset`, ..."""
    name: str
    thread_id: int
    start_ns: int
    end_ns: int
    correlation: int
    """What a launch and the work that it launched have in common; 0: none."""
    device: int


@dataclass(frozen=True, slots=True)
class CaptureFacts:
    """What the served process reports of a capture; times monotonic."""

    capture_id: str
    pid: int
    torch: str
    device: bool
    """True where the process works on a device; else it recorded operators alone."""
    operators: bool
    profiled_since_ns: int
    """From here to `profiled_until_ns` requests are profiled: the profiler was at work."""
    since_ns: int
    """From here to `until_ns` is what counts."""
    until_ns: int
    profiled_until_ns: int
    batches: int
    ended_by: str
    """`batches`, `events`, `seconds`, or `asked`."""
    stop_s: float
    """How long stopping held the process."""
    save_s: float


@dataclass(frozen=True, slots=True)
class TorchCapture:
    """One capture, read."""

    facts: CaptureFacts
    openings: Sequence[Opening]
    openings_dropped: int
    threads: Mapping[int, str]
    """Names of threads in the ledger, by the operating system's id."""
    aliases: Mapping[int, int]
    """What else the trace may call a thread: CUPTI has the low half of Python's ident."""
    events: Sequence[TraceEvent]
    trace: Mapping[str, Any]
    """torch's own, for who hands it on."""
    wall_offset_ns: int
    """To be added to a monotonic time."""


def read_capture(folder: Path) -> TorchCapture:
    """Read the files of a capture in *folder*. Raises StagescopeError where one is torn."""
    ledger, trace = _json(folder / LEDGER_NAME), _json(folder / TRACE_NAME)
    try:
        facts = CaptureFacts(**{name: ledger[name] for name in CaptureFacts.__dataclass_fields__})
        # The clocks run apart by microseconds in the seconds of a capture: one pair does.
        (_, _), (monotonic_ns, wall_ns) = ledger["anchors"]
        offset_ns = wall_ns - monotonic_ns
        threads = {int(number): told for number, told in ledger["threads"].items()}
        return TorchCapture(
            facts=facts,
            openings=list(_openings(ledger, facts.until_ns)),
            openings_dropped=ledger["openings_dropped"],
            threads={number: told["name"] for number, told in threads.items()},
            aliases={
                alias: number
                for number, told in threads.items()
                for alias in (told["ident"] & 0xFFFFFFFF, _signed(told["ident"]), number)
            },
            events=list(_events(trace, offset_ns)),
            trace=trace,
            wall_offset_ns=offset_ns,
        )
    except (KeyError, TypeError, ValueError) as odd:
        raise StagescopeError(
            f"{folder} is no capture of this version: {type(odd).__name__} {odd}"
        ) from odd


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_bytes())
    except OSError as problem:
        raise StagescopeError(f"{file} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise StagescopeError(f"{file} is torn: {problem}") from None


def _signed(ident: int) -> int:
    low = ident & 0xFFFFFFFF
    return low - (1 << 32) if low >> 31 else low


def _openings(ledger: Mapping[str, Any], until_ns: int) -> Iterator[Opening]:
    names = {int(code): name for code, name in ledger["stages"].items()}
    for code, thread_id, start_ns, end_ns, trace_id, span_id, kind in ledger["openings"]:
        end = end_ns or max(until_ns, start_ns)
        yield Opening(names[code], thread_id, start_ns, end, trace_id, span_id, kind)


def _events(trace: Mapping[str, Any], wall_offset_ns: int) -> Iterator[TraceEvent]:
    base_ns = int(trace.get("baseTimeNanoseconds", 0)) - wall_offset_ns
    for event in trace["traceEvents"]:
        if event.get("ph") != "X" or not isinstance(event.get("tid"), int):
            continue
        start_ns = base_ns + round(event["ts"] * 1e3)
        args = event.get("args", {})
        yield TraceEvent(
            event.get("cat", ""), event["name"], event["tid"], start_ns,
            start_ns + round(event.get("dur", 0) * 1e3), int(args.get("correlation", 0)),
            int(args.get("device", 0)),
        )  # fmt: skip


class Found(NamedTuple):
    """The stage of a moment; empty where none is known."""

    stage: str
    how: str
    """`thread`; `ambiguous`: several requests had different stages open on that thread, the one
    opened last is given; `time`: by the one inference under way; `none`."""


NONE = Found("", "none")


class StageAt:
    """Answers for every thread; each lookup is a bisection."""

    def __init__(self, openings: Sequence[Opening], aliases: Mapping[int, int]) -> None:
        by_thread: dict[int, list[Opening]] = defaultdict(list)
        for opening in openings:
            by_thread[opening.thread_id].append(opening)
        self._threads = {thread: _stretches(own) for thread, own in by_thread.items()}
        self._aliases = aliases
        models = [one for one in openings if stage_of(one.stage) == "inference"]
        self._models = _stretches(models, of_any=True)

    def __call__(self, thread_id: int, at_ns: int) -> Found:
        """Return the stage of the thread that a trace calls *thread_id*, at *at_ns*.

        A thread that never opened a stage works for others: for the inference under way, where
        that is but one.
        """
        known = self._threads.get(self._aliases.get(thread_id, thread_id))
        if known is not None:
            return _at(known, at_ns)
        found = _at(self._models, at_ns)
        return Found(found.stage, "time") if found.how == "thread" else NONE


_Stretches = tuple[list[int], list[Found]]
"""Starts, and what holds from each start to the next."""


def _stretches(openings: Sequence[Opening], *, of_any: bool = False) -> _Stretches:
    real = [one for one in openings if one.start_ns < one.end_ns]
    edges = sorted(
        [(one.start_ns, 1, one) for one in real] + [(one.end_ns, 0, one) for one in real],
        key=lambda edge: edge[:2],
    )
    active: list[Opening] = []
    starts: list[int] = []
    founds: list[Found] = []
    for at_ns, opens, opening in edges:
        if opens:
            active.append(opening)
        elif opening in active:
            active.remove(opening)
        found = _now(active, of_any=of_any)
        if not founds or founds[-1] != found:
            starts.append(at_ns)
            founds.append(found)
    return starts, founds


def _now(active: Sequence[Opening], *, of_any: bool) -> Found:
    last = opened_last(active)
    if last is None:
        return NONE
    if of_any:
        alike = len({one.stage for one in active}) == 1
    else:
        # The stage that each request has innermost; where they differ, time does not show whose
        # code runs. A batch and its members are one.
        innermost: dict[str, str] = {}
        for one in active:
            if one.kind == "request":
                innermost[one.span_id] = one.stage
        alike = len(set(innermost.values())) < 2
    return Found(last.stage, "thread" if alike else "ambiguous")


def _at(stretches: _Stretches, at_ns: int) -> Found:
    starts, founds = stretches
    index = bisect_right(starts, at_ns) - 1
    return founds[index] if index >= 0 else NONE
