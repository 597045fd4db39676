"""Turns records into OpenTelemetry spans: one a request or batch, a child for each stage.

Spans are built as they are, without a tracer: their ids and times come from the record, so that
the same record gives the same spans however often it is exported.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.sdk.resources import OTELResourceDetector
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import Link, SpanContext, SpanKind
from opentelemetry.trace.status import Status, StatusCode

from stagescope import semconv as names
from stagescope.exporters.otlp.batch_links import BatchLink
from stagescope.exporters.otlp.resource import KeptResource
from stagescope.exporters.otlp.stage_spans import (
    FAILED,
    UNSET,
    Value,
    context_of,
    link_to,
    sampled_at,
    stage_spans,
    whole_us,
)
from stagescope.exporters.tail_sampling import Kept
from stagescope.records import (
    BatchRecord,
    ColdStartRecord,
    Process,
    Record,
    RequestRecord,
    State,
    last_stage,
)

PROCESS_DIED: Final = "process_died"
CLIENT_LEFT: Final = "disconnect"


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
    yield names.DURATION_NS, record.duration_ns
    yield names.OTHER_NS, record.duration_ns - sum([span.self_ns for span in record.stages])
    if record.run_id:
        yield names.LOAD_RUN_ID, record.run_id
    if error := error_type(record):
        yield names.ERROR_TYPE, error
    if record.state is State.DIED:
        yield names.DIED_IN_STAGE, last_stage(record)


def error_type(record: Record) -> str:
    """Return `error.type`, empty where nothing went wrong (a 4xx is the client's)."""
    if record.state is State.DIED:
        return PROCESS_DIED
    if record.error or not isinstance(record, RequestRecord):
        return record.error
    return str(record.status) if record.status >= 500 else ""


MAX_RESOURCES: Final = 256


class SpanBuilder:
    """Builds the spans of a record; keeps one resource for each served process."""

    def __init__(self) -> None:
        self._shared: dict[str, str] = {
            key: str(value) for key, value in OTELResourceDetector().detect().attributes.items()
        }
        self._of_ring: dict[str, tuple[KeptResource, InstrumentationScope]] = {}

    def spans(
        self, record: Record, batches: Sequence[BatchLink] = (), kept: Kept | None = None
    ) -> list[ReadableSpan]:
        """Return the record's own span, then its stages in the order of their opening.

        *batches* are those that a request was a member of: its stages tell of them. *kept* says why
        and by what probability the record is sent, where that is known.
        """
        if isinstance(record, RequestRecord):
            about = _of_request(record)
        elif isinstance(record, BatchRecord):
            about = _of_batch(record)
        else:
            about = _of_cold_start(record)
        threshold = kept.threshold if kept else None
        if isinstance(record, ColdStartRecord):  # always kept
            threshold = 0
        elif kept:
            about.attributes[names.KEPT_FOR] = kept.reason.value
        resource, scope = self._resource(record.process)
        start = record.process.anchor.wall(record.start_ns)
        own = ReadableSpan(
            about.name,
            context_of(
                record.trace_id,
                about.span_id,
                state=None if threshold is None else sampled_at(threshold),
            ),
            about.parent,
            resource,
            about.attributes,
            (),
            about.links,
            about.kind,
            status=_status(record),
            start_time=whole_us(start),
            end_time=whole_us(start + record.duration_ns),
            instrumentation_scope=scope,
        )
        return [own, *stage_spans(record, own, start, batches)]

    def _resource(self, process: Process) -> tuple[KeptResource, InstrumentationScope]:
        known = self._of_ring.get(process.ring_id)
        if known is None:
            if len(self._of_ring) >= MAX_RESOURCES:
                self._of_ring.pop(next(iter(self._of_ring)))
            resource = KeptResource(self._shared | process_attributes(process))
            known = resource, InstrumentationScope("stagescope", process.version)
            self._of_ring[process.ring_id] = known
        return known


@dataclass(frozen=True, slots=True)
class _About:
    """What the kinds of records differ in."""

    name: str
    span_id: str
    attributes: dict[str, Value]
    links: Sequence[Link] = ()
    kind: SpanKind = SpanKind.INTERNAL
    parent: SpanContext | None = None


def _of_request(record: RequestRecord) -> _About:
    method = names.known_method(record.method)
    verb = "HTTP" if method == names.OTHER_METHOD else method
    parent = record.parent_span_id
    return _About(
        f"{verb} {record.route}" if record.route else verb,
        record.span_id,
        dict(request_attributes(record)),
        kind=SpanKind.INTERNAL if record.internal else SpanKind.SERVER,
        parent=context_of(record.trace_id, parent, not record.internal) if parent else None,
    )


def _of_batch(record: BatchRecord) -> _About:
    return _About(
        f"batch {record.model}" if record.model else "batch",
        record.batch_id,
        dict(batch_attributes(record)),
    )


def _of_cold_start(record: ColdStartRecord) -> _About:
    first = record.first_request
    return _About(
        "cold start",
        record.span_id,
        dict(cold_start_attributes(record)),
        [link_to(first.trace_id, first.span_id)] if first else [],
    )


def _status(record: Record) -> Status:
    error = error_type(record)
    if not error or error == CLIENT_LEFT:
        return UNSET
    if error == PROCESS_DIED:
        return Status(StatusCode.ERROR, f"the process died in stage {last_stage(record)}")
    return FAILED
