"""What a record says, in the names of docs/attributes.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from stagescope.exporters import attributes as names
from stagescope.records import BatchRecord, ColdStartRecord, Process, Record, RequestRecord, State
from stagescope.stages import OTHER, StageSpan
from stagescope.stalls import StageStall

HTTP_METHODS: Final = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
)
OTHER_METHOD: Final = "_OTHER"
PROCESS_DIED: Final = "process_died"
CLIENT_LEFT: Final = "disconnect"

Value = str | int | bool | Sequence[str]


def process_attributes(process: Process) -> dict[str, str | int]:
    """Give the resource attributes of a served process."""
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
    """Give the attributes of a request's span."""
    method = known_method(record.method)
    yield names.HTTP_REQUEST_METHOD, method
    if method == OTHER_METHOD:
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
    """Give the attributes of a batch's span."""
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
    """Give the attributes of a cold start's span."""
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


def stage_attributes(stage: StageSpan, stalls: Sequence[StageStall] = ()) -> dict[str, Value]:
    """Give the attributes of a stage's span; *stalls* are those of this opening."""
    told: dict[str, Value] = {names.STAGE: stage.stage, names.STAGE_SELF_NS: stage.self_ns}
    if stage.open:
        told[names.STAGE_OPEN] = True
    for stall in stalls:
        if name := names.STAGE_STALLS.get(stall.cause):
            told[name] = stall.stall_ns
    return told


def error_type(record: Record) -> str:
    """Give `error.type`, empty where nothing went wrong (a 4xx is the client's)."""
    if record.state is State.DIED:
        return PROCESS_DIED
    if record.error or not isinstance(record, RequestRecord):
        return record.error
    return str(record.status) if record.status >= 500 else ""


def known_method(method: str) -> str:
    """Give *method* where HTTP knows it, else `_OTHER`: what a client invents is unbounded."""
    return method if method in HTTP_METHODS else OTHER_METHOD


def last_stage(record: Record) -> str:
    """Give the stage charged at the record's end: for a death, the stage that it died in."""
    still_open = [span for span in record.stages if span.open]
    return max(still_open, key=lambda span: span.start_ns).stage if still_open else OTHER
