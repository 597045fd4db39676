"""The operators of a capture by stage: what the CPU did, by torch's own names."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping

from stagescope.agent.kernel_rows import row
from stagescope.agent.spans_of_time import Stretch, common, length, union
from stagescope.agent.stage_at import StageAt
from stagescope.agent.torch_trace import CaptureFacts, TorchCapture, TraceEvent
from stagescope.kernels import KernelRow

CPU = "cpu"


def operator_rows(
    capture: TorchCapture,
    stage_at: StageAt,
    spans: Mapping[str, list[Stretch]],
    how: Counter[str],
) -> Iterator[KernelRow]:
    """Give a row for each stage, and for each operator in it, the longest self time first.

    *how* counts how the stages were told.
    """
    facts = capture.facts
    operators = [
        event
        for event in capture.events
        if event.category == "cpu_op" and facts.since_ns <= event.start_ns < facts.until_ns
    ]
    each: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    busy: dict[str, list[Stretch]] = defaultdict(list)
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
    """Give each operator with its time less that of the operators that it called, ns.

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
    busy: list[Stretch],
    span: list[Stretch],
) -> KernelRow:
    count = sum([len(times) for times in by_name.values()])
    span_ns = length(span)
    idle_ns = span_ns - length(common(busy, span))
    return row(
        facts, stage, "stage", "", CPU, count, length(busy), span_ns=span_ns, idle_ns=idle_ns
    )
