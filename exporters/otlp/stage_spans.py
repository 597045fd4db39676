"""The spans below a record's own: its stages, and those that hold a large batch's links.

Times are whole microseconds, and a stage that touches the next of its siblings ends one before it
begins: Jaeger's critical path compares ends with starts by a strict `<` on whole microseconds, and
would leave out every second stage. The exact times are attributes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags, TraceState
from opentelemetry.trace.status import Status, StatusCode

from stagescope import semconv as names
from stagescope.exporters.otlp.batch_links import (
    MOST_LINKS,
    BatchLink,
    attributes_of,
    has_trace,
    stage_in_batch,
    stage_with_members,
)
from stagescope.exporters.record_waits import waits_of
from stagescope.exporters.tail_sampling import RANDOM_DIGITS
from stagescope.identity import stage_span_id
from stagescope.records import BatchRecord, Record, RequestRecord, State
from stagescope.stages import StageSpan, StageStall

US: Final = 1_000
MEMBERS_SPAN: Final = "members"
UNSET: Final = Status(StatusCode.UNSET)
FAILED: Final = Status(StatusCode.ERROR)
_SAMPLED: Final = TraceFlags(TraceFlags.SAMPLED)

Value = str | int | float | bool | Sequence[str]


def whole_us(time_ns: int) -> int:
    """Return *time_ns* without what is less than a microsecond: the order of times stays."""
    return time_ns - time_ns % US


def context_of(
    trace_id: str, span_id: str | int, is_remote: bool = False, state: TraceState | None = None
) -> SpanContext:
    """Return the context of a span by its ids in hex; *state* is what it says of its sampling."""
    number = span_id if isinstance(span_id, int) else int(span_id, 16)
    return SpanContext(int(trace_id, 16), number, is_remote, _SAMPLED, state)


@lru_cache(maxsize=4096)
def sampled_at(threshold: int) -> TraceState:
    """Return the `tracestate` of OpenTelemetry's probability sampling: `ot=th:…`.

    What makes metrics of spans counts each by the reciprocal of its probability.
    https://opentelemetry.io/docs/specs/otel/trace/tracestate-probability-sampling/
    """
    digits = f"{threshold:0{RANDOM_DIGITS}x}".rstrip("0")
    return TraceState([("ot", f"th:{digits or '0'}")])


def link_to(trace_id: str, span_id: str) -> Link:
    """Return a link to a span of another trace."""
    return Link(context_of(trace_id, span_id, True))


def stage_attributes(
    stage: StageSpan,
    stalls: Sequence[StageStall] = (),
    waits: Sequence[StageStall] | None = None,
) -> dict[str, Value]:
    """Return the attributes of a stage's span; *stalls* and *waits* are those of this opening.

    *waits* are None where they are not known.
    """
    told: dict[str, Value] = {
        names.STAGE: stage.stage,
        names.STAGE_SELF_NS: stage.self_ns,
        names.STAGE_START_NS: stage.start_ns,
        names.STAGE_END_NS: stage.end_ns,
    }
    if stage.open:
        told[names.STAGE_OPEN] = True
    for stall in stalls:
        if name := names.STAGE_STALLS.get(stall.cause):
            told[name] = stall.stall_ns
    if waits is not None:
        told[names.STAGE_OWN_NS] = stage.self_ns - sum(wait.stall_ns for wait in waits)
        told |= {names.STAGE_WAITS[wait.cause]: wait.stall_ns for wait in waits}
    return told


def stage_spans(
    record: Record, own: ReadableSpan, begin_ns: int, batches: Sequence[BatchLink] = ()
) -> Iterator[ReadableSpan]:
    """Yield the spans below *own*, the span of *record*, which began at *begin_ns* (wall, exact).

    *batches* are those that a request was a member of.
    """
    owner = int(record.batch_id if isinstance(record, BatchRecord) else record.span_id, 16)
    seen: Counter[int] = Counter()
    contexts: list[SpanContext] = []
    state = own.context.trace_state if own.context else None
    died = record.state is State.DIED
    stalls = record.stalls if isinstance(record, RequestRecord) else ()
    waits = waits_of(record) if isinstance(record, RequestRecord) else None
    told, links = _of_batches(record, batches)
    parents = enclosing(record.stages)
    times = _times(record, parents, begin_ns)
    for index, (stage, parent) in enumerate(zip(record.stages, parents, strict=True)):
        opened = max(stage.start_ns, 0)
        span_id = stage_span_id(owner, opened, seen[opened])
        seen[opened] += 1
        contexts.append(context_of(record.trace_id, span_id, state=state))
        attributes = stage_attributes(
            stage, _of(stalls, index), None if waits is None else _of(waits, index)
        )
        yield _span(
            stage.stage,
            own,
            contexts[index],
            own.context if parent is None else contexts[parent],
            attributes | told.get(index, {}),
            links.get(index, ()),
            FAILED if stage.failed or (died and stage.open) else UNSET,
            times[index],
        )
    if isinstance(record, BatchRecord):
        first = len(links[held]) if (held := stage_with_members(record)) is not None else 0
        yield from _further_members(record, own, owner, first, seen)


def _of_batches(
    record: Record, batches: Sequence[BatchLink]
) -> tuple[Mapping[int, dict[str, str | int]], Mapping[int, Sequence[Link]]]:
    """Return, by the opening of a stage, what it tells of batches, and its links."""
    told: dict[int, dict[str, str | int]] = {}
    links: defaultdict[int, list[Link]] = defaultdict(list)
    if isinstance(record, RequestRecord):
        for batch in batches:
            if (index := stage_in_batch(record, batch)) is not None:
                told[index] = attributes_of(batch)
                if has_trace(batch):
                    links[index].append(link_to(batch.trace_id, batch.span_id))
    elif isinstance(record, BatchRecord) and (index := stage_with_members(record)) is not None:
        members = record.members[:MOST_LINKS]
        links[index] = [link_to(member.trace_id, member.span_id) for member in members]
    return told, links


def _further_members(
    batch: BatchRecord, own: ReadableSpan, owner: int, first: int, seen: Counter[int]
) -> Iterator[ReadableSpan]:
    """Yield spans without length for the links that found no room, at the batch's begin."""
    begin_ns = own.start_time or 0
    for since in range(first, len(batch.members), MOST_LINKS):
        span_id = stage_span_id(owner, 0, seen[0])
        seen[0] += 1
        yield _span(
            MEMBERS_SPAN,
            own,
            context_of(batch.trace_id, span_id, state=own.context and own.context.trace_state),
            own.context,
            {},
            [link_to(m.trace_id, m.span_id) for m in batch.members[since : since + MOST_LINKS]],
            UNSET,
            (begin_ns, begin_ns),
        )


def _span(
    name: str,
    own: ReadableSpan,
    context: SpanContext,
    parent: SpanContext | None,
    attributes: Mapping[str, Value],
    links: Sequence[Link],
    status: Status,
    times: tuple[int, int],
) -> ReadableSpan:
    return ReadableSpan(
        name, context, parent, own.resource, attributes, (), links, SpanKind.INTERNAL,
        status=status, start_time=times[0], end_time=times[1],
        instrumentation_scope=own.instrumentation_scope,
    )  # fmt: skip


def _of(stalls: Sequence[StageStall], opening: int) -> list[StageStall]:
    return [stall for stall in stalls if stall.opening == opening]


def _times(record: Record, parents: Sequence[int | None], begin_ns: int) -> list[tuple[int, int]]:
    """Return start and end of each stage's span, wall time."""
    exact = [clamped(stage, record.duration_ns) for stage in record.stages]
    siblings: defaultdict[int | None, list[int]] = defaultdict(list)
    for (start, _), parent in zip(exact, parents, strict=True):
        siblings[parent].append(start)
    for starts in siblings.values():
        starts.sort()
    seen: Counter[int | None] = Counter()
    times: list[tuple[int, int]] = []
    for (start, end), parent in zip(exact, parents, strict=True):
        seen[parent] += 1
        starts = siblings[parent]
        first, last = whole_us(begin_ns + start), whole_us(begin_ns + end)
        if (following := bisect_left(starts, end, seen[parent])) < len(starts):
            last = min(last, whole_us(begin_ns + starts[following]) - US)
        if parent is not None:
            first, last = min(first, times[parent][1]), min(last, times[parent][1])
        times.append((first, max(first, last)))
    return times


def clamped(stage: StageSpan, duration_ns: int) -> tuple[int, int]:
    """Return start and end of *stage* within its timeline of *duration_ns*."""
    start = min(max(stage.start_ns, 0), duration_ns)
    return start, min(max(stage.end_ns, start), duration_ns)


def enclosing(stages: Sequence[StageSpan]) -> list[int | None]:
    """Return, for each stage in the order of opening, the index of the stage that it nests in.

    That is the one opened last among those still open at its opening which also end no earlier:
    a stage that outlives another (concurrent work) is its sibling, not its child.
    """
    parents: list[int | None] = []
    still_open: list[int] = []
    for index, stage in enumerate(stages):
        still_open = [i for i in still_open if stages[i].end_ns > stage.start_ns]
        around = [i for i in still_open if stages[i].end_ns >= stage.end_ns]
        parents.append(around[-1] if around else None)
        still_open.append(index)
    return parents
