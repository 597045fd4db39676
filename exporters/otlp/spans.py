"""Turns records into OpenTelemetry spans: one a request or batch, a child for each stage.

Spans are built as they are, without a tracer: their ids and times come from the record, so that
the same record gives the same spans however often it is exported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from stagescope import semconv as names
from stagescope.exporters.record_waits import waits_of
from stagescope.identity import stage_span_id
from stagescope.records import (
    BatchRecord,
    ColdStartRecord,
    Process,
    Record,
    RequestRecord,
    State,
    last_stage,
)
from stagescope.stages import StageSpan, StageStall

PROCESS_DIED: Final = "process_died"
CLIENT_LEFT: Final = "disconnect"

Value = str | int | bool | Sequence[str]


def process_attributes(process: Process) -> dict[str, str | int]:
    """Return the resource attributes of a served process."""
    told: dict[str, str | int] = {
        names.SERVICE_INSTANCE_ID: process.ring_id,
        names.HOST_NAME: process.host,
        names.PROCESS_PID: process.pid,
        names.PROCESS_RUNTIME_VERSION: process.python,
        names.TELEMETRY_SDK_NAME: "stagescope",
        names.TELEMETRY_SDK_LANGUAGE: "python",
        names.TELEMETRY_SDK_VERSION: process.version,
    }
    if process.service:
        told[names.SERVICE_NAME] = process.service
    return told


def request_attributes(record: RequestRecord) -> Iterator[tuple[str, Value]]:
    """Yield the attributes of a request's span."""
    method = names.known_method(record.method)
    yield names.HTTP_REQUEST_METHOD, method
    if method == names.OTHER_METHOD:
        yield names.HTTP_REQUEST_METHOD_ORIGINAL, record.method
    if record.status:
        yield names.HTTP_RESPONSE_STATUS_CODE, record.status
        yield names.HTTP_RESPONSE_BODY_SIZE, record.response_bytes
        yield names.CHUNKS, record.chunks
    if record.route:
        yield names.HTTP_ROUTE, record.route
    yield names.URL_PATH, record.path
    yield names.HTTP_REQUEST_BODY_SIZE, record.request_bytes
    if record.first_byte_ns:
        yield names.FIRST_BYTE_NS, record.first_byte_ns
    if record.send_wait_ns:
        yield names.SEND_WAIT_NS, record.send_wait_ns
    if record.chunk_gaps:
        yield names.CHUNK_GAP_MEAN_NS, record.chunk_gap_sum_ns // record.chunk_gaps
        yield names.CHUNK_GAP_MAX_NS, record.chunk_gap_max_ns
    if record.batch_ids:
        yield names.BATCH_IDS, record.batch_ids
    if record.stages_dropped:
        yield names.STAGES_DROPPED, record.stages_dropped
    if record.profiled:
        yield names.PROFILED, True
    yield from _common_attributes(record)


def batch_attributes(record: BatchRecord) -> Iterator[tuple[str, Value]]:
    """Yield the attributes of a batch's span."""
    yield names.BATCH_ID, record.batch_id
    yield names.BATCH_SIZE, record.size
    if record.model:
        yield names.MODEL, record.model
    if record.device_ns:
        yield names.BATCH_DEVICE_NS, record.device_ns
    if record.members_dropped:
        yield names.BATCH_MEMBERS_DROPPED, record.members_dropped
    yield from _common_attributes(record)


def cold_start_attributes(record: ColdStartRecord) -> Iterator[tuple[str, Value]]:
    """Yield the attributes of a cold start's span."""
    if (ready_ns := record.ready_ns()) is not None:
        yield names.COLD_START_READY_NS, ready_ns
    if record.stages_dropped:
        yield names.STAGES_DROPPED, record.stages_dropped
    yield from _common_attributes(record)


def _common_attributes(record: Record) -> Iterator[tuple[str, Value]]:
    yield names.OTHER_NS, record.duration_ns - sum([span.self_ns for span in record.stages])
    if record.run_id:
        yield names.LOAD_RUN_ID, record.run_id
    if error := error_type(record):
        yield names.ERROR_TYPE, error
    if record.state is State.DIED:
        yield names.DIED_IN_STAGE, last_stage(record)


def stage_attributes(
    stage: StageSpan,
    stalls: Sequence[StageStall] = (),
    waits: Sequence[StageStall] | None = None,
) -> dict[str, Value]:
    """Return the attributes of a stage's span; *stalls* and *waits* are those of this opening.

    *waits* are None where they are not known.
    """
    told: dict[str, Value] = {names.STAGE: stage.stage, names.STAGE_SELF_NS: stage.self_ns}
    if stage.open:
        told[names.STAGE_OPEN] = True
    for stall in stalls:
        if name := names.STAGE_STALLS.get(stall.cause):
            told[name] = stall.stall_ns
    if waits is not None:
        told[names.STAGE_OWN_NS] = stage.self_ns - sum(wait.stall_ns for wait in waits)
        told |= {names.STAGE_WAITS[wait.cause]: wait.stall_ns for wait in waits}
    return told


def error_type(record: Record) -> str:
    """Return `error.type`, empty where nothing went wrong (a 4xx is the client's)."""
    if record.state is State.DIED:
        return PROCESS_DIED
    if record.error or not isinstance(record, RequestRecord):
        return record.error
    return str(record.status) if record.status >= 500 else ""


MAX_RESOURCES: Final = 256

_UNSET = Status(StatusCode.UNSET)
_FAILED = Status(StatusCode.ERROR)
_SAMPLED = TraceFlags(TraceFlags.SAMPLED)


@dataclass(frozen=True, slots=True)
class BatchLink:
    """Where a request's batch has its span."""

    trace_id: str
    span_id: str


class ProcessResource(Resource):
    """A resource whose hash is kept: the encoder asks for it at every span."""

    def __init__(self, attributes: Mapping[str, str | int]) -> None:
        super().__init__(attributes)
        self._kept_hash = super().__hash__()

    def __hash__(self) -> int:
        return self._kept_hash

    def __eq__(self, other: object) -> bool:
        return self is other or super().__eq__(other)


class SpanBuilder:
    """Builds the spans of a record; keeps one resource for each served process."""

    def __init__(self) -> None:
        self._shared: dict[str, str] = {
            key: str(value) for key, value in OTELResourceDetector().detect().attributes.items()
        }
        self._of_ring: dict[str, tuple[ProcessResource, InstrumentationScope]] = {}

    def spans(self, record: Record, batches: Sequence[BatchLink] = ()) -> list[ReadableSpan]:
        """Return the record's own span, then its stages in the order of their opening.

        *batches* are where the batches of a request have their spans; it links to them.
        """
        if isinstance(record, RequestRecord):
            about = _of_request(record, batches)
        elif isinstance(record, BatchRecord):
            about = _of_batch(record)
        else:
            about = _of_cold_start(record)
        resource, scope = self._resource(record.process)
        start = record.process.anchor.wall(record.start_ns)
        own = ReadableSpan(
            about.name,
            _context(record.trace_id, about.span_id),
            about.parent,
            resource,
            about.attributes,
            (),
            about.links,
            about.kind,
            status=_status(record),
            start_time=start,
            end_time=start + record.duration_ns,
            instrumentation_scope=scope,
        )
        return [own, *_stage_spans(record, own)]

    def _resource(self, process: Process) -> tuple[ProcessResource, InstrumentationScope]:
        known = self._of_ring.get(process.ring_id)
        if known is None:
            if len(self._of_ring) >= MAX_RESOURCES:
                self._of_ring.pop(next(iter(self._of_ring)))
            resource = ProcessResource(self._shared | process_attributes(process))
            known = resource, InstrumentationScope("stagescope", process.version)
            self._of_ring[process.ring_id] = known
        return known


@dataclass(frozen=True, slots=True)
class _About:
    """What the kinds of records differ in."""

    name: str
    span_id: str
    attributes: dict[str, Value]
    links: Sequence[Link]
    kind: SpanKind = SpanKind.INTERNAL
    parent: SpanContext | None = None


def _of_request(record: RequestRecord, batches: Sequence[BatchLink]) -> _About:
    method = names.known_method(record.method)
    verb = "HTTP" if method == names.OTHER_METHOD else method
    parent = record.parent_span_id
    return _About(
        f"{verb} {record.route}" if record.route else verb,
        record.span_id,
        dict(request_attributes(record)),
        [_link(batch.trace_id, batch.span_id) for batch in batches],
        SpanKind.INTERNAL if record.internal else SpanKind.SERVER,
        _context(record.trace_id, parent, not record.internal) if parent else None,
    )


def _of_batch(record: BatchRecord) -> _About:
    return _About(
        f"batch {record.model}" if record.model else "batch",
        record.batch_id,
        dict(batch_attributes(record)),
        [_link(member.trace_id, member.span_id) for member in record.members],
    )


def _of_cold_start(record: ColdStartRecord) -> _About:
    first = record.first_request
    return _About(
        "cold start",
        record.span_id,
        dict(cold_start_attributes(record)),
        [_link(first.trace_id, first.span_id)] if first else [],
    )


def _status(record: Record) -> Status:
    error = error_type(record)
    if not error or error == CLIENT_LEFT:
        return _UNSET
    if error == PROCESS_DIED:
        return Status(StatusCode.ERROR, f"the process died in stage {last_stage(record)}")
    return _FAILED


def _stage_spans(record: Record, own: ReadableSpan) -> Iterator[ReadableSpan]:
    own_context = own.context
    owner = int(record.batch_id if isinstance(record, BatchRecord) else record.span_id, 16)
    seen: Counter[int] = Counter()
    begin = own.start_time or 0
    contexts: list[SpanContext] = []
    died = record.state is State.DIED
    stalls = record.stalls if isinstance(record, RequestRecord) else ()
    waits = waits_of(record) if isinstance(record, RequestRecord) else None
    for index, (stage, parent) in enumerate(
        zip(record.stages, enclosing(record.stages), strict=True)
    ):
        opened = max(stage.start_ns, 0)
        span_id = stage_span_id(owner, opened, seen[opened])
        seen[opened] += 1
        context = _context(record.trace_id, span_id)
        contexts.append(context)
        start, end = clamped(stage, record.duration_ns)
        yield ReadableSpan(
            stage.stage,
            context,
            own_context if parent is None else contexts[parent],
            own.resource,
            stage_attributes(
                stage, _of(stalls, index), None if waits is None else _of(waits, index)
            ),
            kind=SpanKind.INTERNAL,
            status=_FAILED if stage.failed or (died and stage.open) else _UNSET,
            start_time=begin + start,
            end_time=begin + end,
            instrumentation_scope=own.instrumentation_scope,
        )


def _of(stalls: Sequence[StageStall], opening: int) -> list[StageStall]:
    return [stall for stall in stalls if stall.opening == opening]


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


def _link(trace_id: str, span_id: str) -> Link:
    return Link(_context(trace_id, span_id, True))


def _context(trace_id: str, span_id: str | int, is_remote: bool = False) -> SpanContext:
    number = span_id if isinstance(span_id, int) else int(span_id, 16)
    return SpanContext(int(trace_id, 16), number, is_remote, _SAMPLED)
