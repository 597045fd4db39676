"""How a row of the kernel table is made, and how rows travel between processes."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from stagescope.agent.kernels.trace import CaptureFacts, StageAt, TorchCapture, TraceEvent
from stagescope.errors import StagescopeError
from stagescope.files import replace_file
from stagescope.kernels import KernelRow

ROWS_NAME = "kernels.ndjson"
"""In a capture's folder in the spool: what an agent takes up of a capture that others made."""


def row(
    facts: CaptureFacts,
    stage: str,
    kind: str,
    name: str,
    device: str,
    launches: int,
    busy_ns: int,
    *,
    span_ns: int = 0,
    idle_ns: int = 0,
    host_wait_ns: int = 0,
    bound: str = "",
    unmatched: int = 0,
) -> KernelRow:
    """Make a row of the capture of *facts*."""
    return KernelRow(
        facts.capture_id, facts.pid, facts.since_ns, facts.until_ns, stage, kind, name, device,
        launches, busy_ns, span_ns, idle_ns, host_wait_ns, bound, unmatched,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recorded:
    """A capture as an agent keeps it."""

    facts: CaptureFacts
    rows: tuple[KernelRow, ...]


def write_rows(folder: Path, recorded: Recorded) -> None:
    """Write `kernels.ndjson` of *folder*, whole or not at all. Raises OSError."""
    told = [asdict(recorded.facts), *[asdict(one) for one in recorded.rows]]
    replace_file(folder / ROWS_NAME, "".join(json.dumps(one) + "\n" for one in told))


def read_rows(file: Path) -> Recorded:
    """Read what `write_rows` wrote. Raises StagescopeError where it is torn or of another version."""
    try:
        first, *rest = [json.loads(line) for line in file.read_bytes().splitlines()]
        return Recorded(CaptureFacts(**first), tuple([KernelRow(**one) for one in rest]))
    except (OSError, TypeError, ValueError) as problem:
        raise StagescopeError(f"{file} cannot be read: {problem}") from problem


def by_stage(rows: Iterable[KernelRow]) -> list[tuple[KernelRow, list[KernelRow]]]:
    """Return each stage's row with the rows of what ran in it, the busiest stage first."""
    every = list(rows)
    heads = sorted([one for one in every if one.kind == "stage"], key=lambda one: -one.busy_ns)
    return [
        (head, [one for one in every if one.kind != "stage" and _of(one) == _of(head)])
        for head in heads
    ]


def _of(one: KernelRow) -> tuple[str, str]:
    return one.stage, one.device


Interval = tuple[int, int]
"""From, until; ns."""


def union(stretches: Iterable[Interval]) -> list[Interval]:
    """Return what at least one of *stretches* covers, in order, without overlaps."""
    covered: list[Interval] = []
    for start, end in sorted(stretches):
        if end <= start:
            continue
        if covered and start <= covered[-1][1]:
            covered[-1] = covered[-1][0], max(end, covered[-1][1])
        else:
            covered.append((start, end))
    return covered


def length(stretches: Iterable[Interval]) -> int:
    """Return the sum of the lengths."""
    return sum([end - start for start, end in stretches])


def common(one: Sequence[Interval], other: Sequence[Interval]) -> list[Interval]:
    """Return what lies in both; each is a union."""
    both: list[Interval] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            both.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return both


def gaps(covered: Sequence[Interval], since: int, until: int) -> list[Interval]:
    """Return what *covered*, a union, leaves open from *since* to *until*."""
    edges = [since, *[edge for stretch in covered for edge in stretch], until]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(max(a, since), min(b, until)) for a, b in pairs if max(a, since) < min(b, until)]


CPU = "cpu"


def operator_rows(
    capture: TorchCapture,
    stage_at: StageAt,
    spans: Mapping[str, list[Interval]],
    how: Counter[str],
) -> Iterator[KernelRow]:
    """Yield a row for each stage, and for each operator in it, the longest self time first.

    *how* counts how the stages were found.
    """
    facts = capture.facts
    operators = [
        event
        for event in capture.events
        if event.category == "cpu_op" and facts.since_ns <= event.start_ns < facts.until_ns
    ]
    each: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    busy: dict[str, list[Interval]] = defaultdict(list)
    for event, self_ns in self_times(operators):
        found = stage_at(event.thread_id, event.start_ns)
        how[found.how] += 1
        each[found.stage][event.name].append(self_ns)
        busy[found.stage].append((event.start_ns, event.end_ns))
    for stage, by_name in sorted(each.items()):
        yield _stage_row(facts, stage, by_name, union(busy[stage]), spans.get(stage, []))
        for name, times in sorted(by_name.items(), key=lambda pair: -sum(pair[1])):
            yield row(facts, stage, "operator", name, CPU, len(times), sum(times))


def self_times(operators: Iterable[TraceEvent]) -> Iterator[tuple[TraceEvent, int]]:
    """Yield each operator with its time less that of the operators that it called, ns.

    One called by another lies within it, on the same thread.
    """
    stacks: dict[int, list[tuple[TraceEvent, list[int]]]] = defaultdict(list)
    for event in sorted(operators, key=lambda one: (one.start_ns, -one.end_ns)):
        stack = stacks[event.thread_id]
        while stack and stack[-1][0].end_ns <= event.start_ns:
            yield _own(*stack.pop())
        if stack:
            stack[-1][1].append(min(event.end_ns, stack[-1][0].end_ns) - event.start_ns)
        stack.append((event, []))
    for stack in stacks.values():
        while stack:
            yield _own(*stack.pop())


def _own(event: TraceEvent, called: list[int]) -> tuple[TraceEvent, int]:
    return event, max(0, event.end_ns - event.start_ns - sum(called))


def _stage_row(
    facts: CaptureFacts,
    stage: str,
    by_name: Mapping[str, list[int]],
    busy: list[Interval],
    span: list[Interval],
) -> KernelRow:
    count = sum([len(times) for times in by_name.values()])
    span_ns = length(span)
    idle_ns = span_ns - length(common(busy, span))
    return row(
        facts, stage, "stage", "", CPU, count, length(busy), span_ns=span_ns, idle_ns=idle_ns
    )
