"""Every attribute and metric name that we emit, once; docs/attributes.md is printed from it.

Names, types and stability are OpenTelemetry's where a convention exists
(https://opentelemetry.io/docs/specs/semconv/, release 1.38); `model_server.*` where none does.
The names of samples stand in sample_names.py; `scripts/pages` prints the page.
Durations in attributes are whole nanoseconds and say so in the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from stagescope.samples import LEVEL, SampleName

SERVICE_NAME: Final = "service.name"
SERVICE_INSTANCE_ID: Final = "service.instance.id"
HOST_NAME: Final = "host.name"
PROCESS_PID: Final = "process.pid"
HARDWARE_ID: Final = "hw.id"
PROCESS_RUNTIME_VERSION: Final = "process.runtime.version"
TELEMETRY_SDK_NAME: Final = "telemetry.sdk.name"
TELEMETRY_SDK_LANGUAGE: Final = "telemetry.sdk.language"
TELEMETRY_SDK_VERSION: Final = "telemetry.sdk.version"

HTTP_REQUEST_METHOD: Final = "http.request.method"
HTTP_REQUEST_METHOD_ORIGINAL: Final = "http.request.method_original"
HTTP_RESPONSE_STATUS_CODE: Final = "http.response.status_code"
HTTP_ROUTE: Final = "http.route"
HTTP_REQUEST_BODY_SIZE: Final = "http.request.body.size"
HTTP_RESPONSE_BODY_SIZE: Final = "http.response.body.size"
URL_PATH: Final = "url.path"
URL_FULL: Final = "url.full"
SERVER_ADDRESS: Final = "server.address"
SERVER_PORT: Final = "server.port"
ERROR_TYPE: Final = "error.type"

STAGE: Final = "model_server.stage"
STAGE_SELF_NS: Final = "model_server.stage.self_ns"
STAGE_OPEN: Final = "model_server.stage.open"
STAGE_START_NS: Final = "model_server.stage.start_ns"
STAGE_END_NS: Final = "model_server.stage.end_ns"
DURATION_NS: Final = "model_server.duration_ns"
OTHER_NS: Final = "model_server.other_ns"
STAGES_DROPPED: Final = "model_server.stages_dropped"
DIED_IN_STAGE: Final = "model_server.died_in_stage"
FIRST_BYTE_NS: Final = "model_server.response.first_byte_ns"
SEND_WAIT_NS: Final = "model_server.response.send_wait_ns"
CHUNKS: Final = "model_server.response.chunks"
CHUNK_GAP_MEAN_NS: Final = "model_server.response.chunk_gap.mean_ns"
CHUNK_GAP_MAX_NS: Final = "model_server.response.chunk_gap.max_ns"
PROFILED: Final = "model_server.profiled"
LOAD_RUN_ID: Final = "model_server.load_run.id"
KEPT_FOR: Final = "model_server.kept_for"
LOAD_RUN_RATE: Final = "model_server.load_run.rate"
LOAD_PHASE: Final = "model_server.load_run.phase"
CLIENT_FIRST_BYTE_NS: Final = "model_server.client.first_byte_ns"
MODEL: Final = "model_server.model"
BATCH_ID: Final = "model_server.batch.id"
BATCH_IDS: Final = "model_server.batch.ids"
BATCH_SIZE: Final = "model_server.batch.size"
BATCH_WORKER: Final = "model_server.batch.worker"
BATCH_POSITION: Final = "model_server.batch.position"
BATCH_DEVICE_NS: Final = "model_server.batch.device_ns"
BATCH_MEMBERS_DROPPED: Final = "model_server.batch.members_dropped"

COLD_START_READY_NS: Final = "model_server.cold_start.ready_ns"
COLD_START_UNTIL: Final = "model_server.cold_start.until"
WAIT_CAUSE: Final = "model_server.wait.cause"
STATUS_CLASS: Final = "model_server.status_class"
STAGE_STALLS: Final = {
    "loop": "model_server.stage.stall.loop_ns",
    "gc": "model_server.stage.stall.gc_ns",
}
"""By the cause of a stall."""
STAGE_OWN_NS: Final = "model_server.stage.own_ns"
STAGE_WAITS: Final = {
    cause: f"model_server.stage.wait.{cause}_ns" for cause in ("event_loop", "cpu", "gc", "stopped")
}
"""By the cause of a wait."""

METRIC_REQUEST_DURATION: Final = "http.server.request.duration"
METRIC_ACTIVE_REQUESTS: Final = "http.server.active_requests"
METRIC_STAGE_DURATION: Final = "model_server.stage.duration"
METRIC_SUB_STAGE_DURATION: Final = "model_server.sub_stage.duration"
METRIC_WORKER_DURATION: Final = "model_server.worker.request.duration"
METRIC_BATCH_SIZE: Final = "model_server.batch.size"
METRIC_BATCH_DURATION: Final = "model_server.batch.duration"
METRIC_STAGE_STALL: Final = "model_server.stage.stall"
METRIC_STAGE_OWN: Final = "model_server.stage.own"
METRIC_STAGE_WAIT: Final = "model_server.stage.wait"
METRIC_PROFILED: Final = "model_server.profiled_requests"
METRIC_COLD_START: Final = "model_server.cold_start.duration"
METRIC_COLD_START_STAGE: Final = "model_server.cold_start.stage.duration"

METRIC_COLLECTOR_CALLS: Final = "stagescope.collector.calls"
METRIC_COLLECTOR_LATE: Final = "stagescope.collector.late"
METRIC_COLLECTOR_LONGEST: Final = "stagescope.collector.longest"
METRIC_SERIES_LEFT_OUT: Final = "stagescope.samples.series_left_out"

HTTP_METHODS: Final = frozenset(
    ("CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE")
)
OTHER_METHOD: Final = "_OTHER"


def known_method(method: str) -> str:
    """Return *method* where HTTP knows it, else `_OTHER`: what clients can invent is unbounded."""
    return method if method in HTTP_METHODS else OTHER_METHOD


OTEL_STABLE: Final = "OpenTelemetry, stable"
OTEL_DEVELOPMENT: Final = "OpenTelemetry, development"
OURS: Final = "stagescope, kept within a major version"

RESOURCE: Final = "resource"
REQUEST_SPAN: Final = "request span"
STAGE_SPAN: Final = "stage span"
BATCH_SPAN: Final = "batch span"
COLD_START_SPAN: Final = "cold start span"
CLIENT_SPAN: Final = "client span"
CLIENT_PART_SPAN: Final = "span of a part of the client's time"


@dataclass(frozen=True, slots=True)
class Attribute:
    """One attribute: where it stands, what it holds, and who promises its name."""

    name: str
    type: str
    """OpenTelemetry's word: string, int, double, boolean or string[]."""
    unit: str
    """As UCUM writes it (ns, By); empty where there is none."""
    on: tuple[str, ...]
    doc: str
    stability: str = OURS


_WAITED: Final = {
    "event_loop": "A least: it could have gone on, and other code ran on the event loop.",
    "cpu": "Its thread was ready to run and had no core.",
    "gc": "The garbage collector ran.",
    "stopped": "The whole process was stopped.",
}


@dataclass(frozen=True, slots=True)
class MetricName:
    """One metric: OpenTelemetry's name, Prometheus's, and its labels there."""

    name: str
    prometheus: str
    type: str
    unit: str
    labels: tuple[str, ...]
    doc: str
    stability: str = OURS


ATTRIBUTES: Final = (
    Attribute(
        SERVICE_NAME, "string", "", (RESOURCE,),
        "The service that the middleware was told; else that of `OTEL_SERVICE_NAME`.", OTEL_STABLE,
    ),
    Attribute(
        SERVICE_INSTANCE_ID, "string", "", (RESOURCE,),
        "The id of the recorder file: 32 hex digits, new for each served process.", OTEL_STABLE,
    ),
    Attribute(HOST_NAME, "string", "", (RESOURCE,), "Host of the served process.",
              OTEL_DEVELOPMENT),
    Attribute(PROCESS_PID, "int", "", (RESOURCE,), "Process id of the served process.",
              OTEL_DEVELOPMENT),
    Attribute(PROCESS_RUNTIME_VERSION, "string", "", (RESOURCE,),
              "Python that the served process runs.", OTEL_DEVELOPMENT),
    Attribute(TELEMETRY_SDK_NAME, "string", "", (RESOURCE,), "`stagescope`.", OTEL_STABLE),
    Attribute(TELEMETRY_SDK_LANGUAGE, "string", "", (RESOURCE,), "`python`.", OTEL_STABLE),
    Attribute(TELEMETRY_SDK_VERSION, "string", "", (RESOURCE,),
              "The stagescope that wrote the record.", OTEL_STABLE),
    Attribute(HTTP_REQUEST_METHOD, "string", "", (REQUEST_SPAN, CLIENT_SPAN),
              "The method; `_OTHER` where HTTP knows no such method.", OTEL_STABLE),
    Attribute(HTTP_REQUEST_METHOD_ORIGINAL, "string", "", (REQUEST_SPAN,),
              "The method as sent, where `http.request.method` is `_OTHER`.", OTEL_STABLE),
    Attribute(HTTP_RESPONSE_STATUS_CODE, "int", "", (REQUEST_SPAN, CLIENT_SPAN),
              "Status; absent where no response was started.", OTEL_STABLE),
    Attribute(HTTP_ROUTE, "string", "", (REQUEST_SPAN,),
              "Route template; absent where the framework gave none.", OTEL_STABLE),
    Attribute(HTTP_REQUEST_BODY_SIZE, "int", "By", (REQUEST_SPAN, CLIENT_SPAN),
              "Bytes of the body as read by the app.", OTEL_DEVELOPMENT),
    Attribute(HTTP_RESPONSE_BODY_SIZE, "int", "By", (REQUEST_SPAN, CLIENT_SPAN),
              "Bytes of the body as handed to the server.", OTEL_DEVELOPMENT),
    Attribute(URL_PATH, "string", "", (REQUEST_SPAN,),
              "Path without the query string, cut after 128 bytes.", OTEL_STABLE),
    Attribute(URL_FULL, "string", "", (CLIENT_SPAN,), "URL without user, password and query.",
              OTEL_STABLE),
    Attribute(SERVER_ADDRESS, "string", "", (CLIENT_SPAN,), "Host of the URL.", OTEL_STABLE),
    Attribute(SERVER_PORT, "int", "", (CLIENT_SPAN,), "Port of the URL.", OTEL_STABLE),
    Attribute(
        ERROR_TYPE, "string", "", (REQUEST_SPAN, BATCH_SPAN, COLD_START_SPAN, CLIENT_SPAN),
        "Class name of the exception; else `disconnect` (the client left), `incomplete` (the app "
        "ended within its response), `process_died`, the status of a 5xx "
        "response, or `startup failed`. On a client span the driver's word (docs/load.md), or the "
        "status from 400 on.", OTEL_STABLE,
    ),
    Attribute(STAGE, "string", "", (STAGE_SPAN,), "Full name of the stage: `queue.threadpool`."),
    Attribute(
        STAGE_SELF_NS, "int", "ns", (STAGE_SPAN,),
        "What this opening is charged: its length less the time in which a stage opened later was "
        "open. All of a request, with `model_server.other_ns`, sum to its duration.",
    ),
    Attribute(STAGE_START_NS, "int", "ns", (STAGE_SPAN,),
              "When it opened, since the request's or batch's start: exact, where the span has "
              "whole microseconds."),
    Attribute(STAGE_END_NS, "int", "ns", (STAGE_SPAN,), "When it closed, likewise."),
    Attribute(STAGE_OPEN, "boolean", "", (STAGE_SPAN,),
              "True where the stage was still open when the request ended or the process died."),
    Attribute(STAGE_STALLS["loop"], "int", "ns", (STAGE_SPAN,),
              "What of this opening's time passed while the event loop was late; an overlap, not "
              "a cause (docs/waits.md). Absent where there was none."),
    Attribute(STAGE_STALLS["gc"], "int", "ns", (STAGE_SPAN,),
              "What of this opening's time passed while the garbage collector ran. Absent where "
              "there was none."),
    Attribute(STAGE_OWN_NS, "int", "ns", (STAGE_SPAN,),
              "A most: what is left of `model_server.stage.self_ns` without the waits below "
              "(docs/waits.md). Absent outside load runs."),
    *(
        Attribute(name, "int", "ns", (STAGE_SPAN,),
                  f"{_WAITED[cause]} Absent where it did not wait, and outside load runs.")
        for cause, name in STAGE_WAITS.items()
    ),
    Attribute(COLD_START_READY_NS, "int", "ns", (COLD_START_SPAN,),
              "From the start of the process until the app could serve; absent where it never "
              "could."),
    Attribute(DURATION_NS, "int", "ns",
              (REQUEST_SPAN, BATCH_SPAN, COLD_START_SPAN, CLIENT_SPAN, CLIENT_PART_SPAN),
              "How long it took: exact, where the span has whole microseconds."),
    Attribute(OTHER_NS, "int", "ns", (REQUEST_SPAN, BATCH_SPAN, COLD_START_SPAN), "Time that no stage claimed."),
    Attribute(STAGES_DROPPED, "int", "", (REQUEST_SPAN, COLD_START_SPAN),
              "Openings that found no room in the record; their time is with the stage around."),
    Attribute(DIED_IN_STAGE, "string", "", (REQUEST_SPAN, BATCH_SPAN, COLD_START_SPAN),
              "The stage that was open when the process died."),
    Attribute(FIRST_BYTE_NS, "int", "ns", (REQUEST_SPAN,),
              "From the start until the first body byte had been handed over."),
    Attribute(SEND_WAIT_NS, "int", "ns", (REQUEST_SPAN,),
              "Time in which the server waited for the client to take bytes."),
    Attribute(CHUNKS, "int", "", (REQUEST_SPAN, CLIENT_SPAN), "Body chunks that were sent."),
    Attribute(CHUNK_GAP_MEAN_NS, "int", "ns", (REQUEST_SPAN,),
              "Mean time between one chunk with bytes and the next; absent where there was one."),
    Attribute(CHUNK_GAP_MAX_NS, "int", "ns", (REQUEST_SPAN,), "The longest of these times."),
    Attribute(PROFILED, "boolean", "", (REQUEST_SPAN,),
              "True where a capture was at work meanwhile, so that its times are not the server's "
              "own (docs/capture.md). Absent else."),
    Attribute(LOAD_RUN_ID, "string", "", (REQUEST_SPAN, BATCH_SPAN, CLIENT_SPAN),
              "The load run that sent it (W3C baggage `stagescope.run`)."),
    Attribute(KEPT_FOR, "string", "", (REQUEST_SPAN, BATCH_SPAN),
              "Why it is sent: `load_run`, `error`, `slow`, `nested`, `share` or `floor` "
              "(docs/exporters.md); of a batch, why its first member is."),
    Attribute(LOAD_RUN_RATE, "double", "{request}/s", (CLIENT_SPAN,),
              "Requests a second that the load run was asked for."),
    Attribute(LOAD_PHASE, "string", "", (CLIENT_SPAN,), "`warmup` or `measure`."),
    Attribute(CLIENT_FIRST_BYTE_NS, "int", "ns", (CLIENT_SPAN,),
              "From the span's start until the response's head was there; absent without one."),
    Attribute(MODEL, "string", "", (BATCH_SPAN, STAGE_SPAN),
              "The model that the batch went to; on the stage of a request that ran in a batch."),
    Attribute(BATCH_ID, "string", "", (BATCH_SPAN,),
              "16 hex digits; also the id of the batch's span."),
    Attribute(BATCH_IDS, "string[]", "", (REQUEST_SPAN,),
              "The batches that the request was a member of."),
    Attribute(BATCH_SIZE, "int", "", (BATCH_SPAN, STAGE_SPAN),
              "Members; on the stage of a request that ran in a batch."),
    Attribute(BATCH_WORKER, "int", "", (STAGE_SPAN,),
              "Process id of who ran the batch that the request's stage ran in."),
    Attribute(BATCH_POSITION, "int", "", (STAGE_SPAN,),
              "The request's place among the members of that batch, from 0."),
    Attribute(BATCH_DEVICE_NS, "int", "ns", (BATCH_SPAN,),
              "Device time of the whole batch; absent where it was not measured."),
    Attribute(BATCH_MEMBERS_DROPPED, "int", "", (BATCH_SPAN,),
              "Members that the record had no room to name, so that they are not linked."),
)  # fmt: skip
"""In the order of the document."""

WAIT_SECONDS: Final = {
    "loop_lag_seconds": "loop_lag_ns",
    "gc_pause_seconds": "gc_pause_ns",
    "gil_wait_seconds": "gil_wait_ns",
    "watch_seconds": "watch_cost_ns",
    "gil_watch_seconds": "gil_cost_ns",
    "pool_busy_seconds": "pool_busy_ns",
    "loop_lag_max_seconds": "loop_lag_max_ns",
    "gc_pause_max_seconds": "gc_pause_max_ns",
    "gil_wait_max_seconds": "gil_wait_max_ns",
}
"""Metric name to the figure of the recorder file (`stagescope.recorder.format.WAITS`) that it is made of."""

PROCESS_WAITS: Final = (
    ("loop_ticks", "counter", "", "Readings of the event loops' timers."),
    ("loop_lag_seconds", "counter", "s", "By how much the readings came late, summed."),
    ("gc_pauses", "counter", "", "Runs of the garbage collector."),
    ("gc_pause_seconds", "counter", "s", "Time in them."),
    ("gil_ticks", "counter", "", "Readings of the wait for the interpreter's lock."),
    ("gil_wait_seconds", "counter", "s", "Those waits, summed; an estimate."),
    ("watch_seconds", "counter", "s", "What the timer's readings cost."),
    ("gil_watch_seconds", "counter", "s", "CPU time of the readings of the lock."),
    ("loop_lag_max_seconds", "gauge", "s", "The latest reading of any live process."),
    ("gc_pause_max_seconds", "gauge", "s", "The longest pause of any live process."),
    ("gil_wait_max_seconds", "gauge", "s", "The longest wait of any live process."),
    ("pool_threads", "gauge", "", "Worker threads that there may be (anyio's limiter)."),
    ("pool_busy", "gauge", "", "Worker threads at work at the last reading."),
    ("pool_busy_seconds", "counter", "s", "Time that worker threads were at work, all summed."),
    ("pool_waiting", "gauge", "", "Calls that waited for a worker thread at the last reading."),
    ("pool_waiting_max", "gauge", "", "The most that waited at any reading of a live process."),
)
"""Name after `model_server.process.`, type, unit, meaning; by service, all its processes."""

METRICS: Final = (
    MetricName(
        METRIC_REQUEST_DURATION, "http_server_request_duration_seconds", "histogram", "s",
        ("service", "method", "route", "status"),
        "From the first line of the middleware until the last byte.", OTEL_STABLE,
    ),
    MetricName(
        METRIC_STAGE_DURATION, "model_server_stage_duration_seconds", "histogram", "s",
        ("service", "route", "stage"),
        "What one request charged to one stage, sub-stages in it; `other` is what none claimed.",
    ),
    MetricName(
        METRIC_SUB_STAGE_DURATION, "model_server_sub_stage_duration_seconds", "histogram", "s",
        ("service", "route", "sub_stage"), "What one request charged to one sub-stage, by full name.",
    ),
    MetricName(
        METRIC_WORKER_DURATION, "model_server_worker_request_duration_seconds", "histogram", "s",
        ("service", "worker"), "The same as http.server.request.duration, by process id.",
    ),
    MetricName(
        METRIC_BATCH_SIZE, "model_server_batch_size", "histogram", "", ("service", "model"),
        "Members of a batch.",
    ),
    MetricName(
        METRIC_BATCH_DURATION, "model_server_batch_duration_seconds", "histogram", "s",
        ("service", "model"), "From a batch's first member until its model was done.",
    ),
    MetricName(
        METRIC_STAGE_STALL, "model_server_stage_stall_seconds", "counter", "s",
        ("service", "stage", "cause"),
        "What requests charged to a stage while the event loop was late (`loop`) or the garbage "
        "collector ran (`gc`).",
    ),
    MetricName(
        METRIC_STAGE_OWN, "model_server_stage_own_seconds", "histogram", "s", ("service", "stage"),
        "What one request of a load run charged to one stage without the waits of the next metric; "
        "at most, see `model_server.stage.own_ns`.",
    ),
    MetricName(
        METRIC_STAGE_WAIT, "model_server_stage_wait_seconds", "histogram", "s",
        ("service", "stage", "cause"),
        "What one request of a load run waited within one stage for one cause: `event_loop`, `cpu`, "
        "`gc`, `stopped`; those that did not wait are not counted.",
    ),
    MetricName(
        METRIC_PROFILED, "model_server_profiled_requests", "counter", "", ("service",),
        "Requests that overlap a capture: they are in no histogram.",
    ),
    MetricName(
        METRIC_COLD_START, "model_server_cold_start_duration_seconds", "histogram", "s",
        ("service", "until"),
        "From the start of a process until it was `ready`, had answered its `first_request`, was "
        "`steady` (docs/cold-start.md).",
    ),
    MetricName(
        METRIC_COLD_START_STAGE, "model_server_cold_start_stage_duration_seconds", "histogram",
        "s", ("service", "stage"), "What one cold start charged to one stage, by full name.",
    ),
    *(
        MetricName(
            f"model_server.process.{name}", f"model_server_process_{name}", kind, unit,
            ("service",), doc,
        )
        for name, kind, unit, doc in PROCESS_WAITS
    ),
    MetricName(
        METRIC_ACTIVE_REQUESTS, "http_server_active_requests", "gauge", "", ("service",),
        "Requests in flight when the agent last looked.", OTEL_DEVELOPMENT,
    ),
)  # fmt: skip
"""Beside these stands one `stagescope_*` counter or gauge for each of the agent's own counts."""


COLLECTOR_METRICS: Final = (
    MetricName(
        METRIC_COLLECTOR_CALLS, "stagescope_collector_calls", "counter", "", ("collector",),
        "Calls of one of the agent's collectors.",
    ),
    MetricName(
        METRIC_COLLECTOR_LATE, "stagescope_collector_late_seconds", "counter", "s",
        ("collector",), "By how much its calls came late, summed.",
    ),
    MetricName(
        METRIC_COLLECTOR_LONGEST, "stagescope_collector_longest_seconds", "gauge", "s",
        ("collector",), "The longest that one call took.",
    ),
    MetricName(
        METRIC_SERIES_LEFT_OUT, "stagescope_samples_series_left_out", "gauge", "", (),
        "Series of samples that are not shown, because there are too many.",
    ),
)  # fmt: skip
"""What the agent reports about its own sampling; the collectors' CPU time is a sample."""

_PROMETHEUS_UNITS: Final = {
    "1": "ratio", "%": "percent", "A": "amperes", "By": "bytes", "Cel": "celsius",
    "Hz": "hertz", "J": "joules", "V": "volts", "W": "watts", "d": "days", "h": "hours",
    "m": "meters", "min": "minutes", "ms": "milliseconds", "ns": "nanoseconds", "s": "seconds",
    "us": "microseconds",
}  # fmt: skip
_PER: Final = {"s": "second", "min": "minute", "h": "hour", "d": "day"}
_NOT_IN_A_NAME: Final = re.compile(r"[^a-zA-Z0-9]+")


def prometheus_name(named: SampleName) -> str:
    """Return a sample's name in Prometheus: its unit at the end, a counter's `_total` not yet.

    As https://opentelemetry.io/docs/specs/otel/compatibility/prometheus_and_openmetrics/ says.
    """
    name, unit = prometheus_label(named.name), prometheus_unit(named)
    return name if not unit or name.endswith(f"_{unit}") else f"{name}_{unit}"


def prometheus_unit(named: SampleName) -> str:
    """Return the word that Prometheus has for a unit; empty for `{thread}` and the like."""
    if named.unit == "1" and named.kind != LEVEL:
        return ""  # a count of things, not a ratio
    of, _, per = named.unit.partition("/")
    word = "" if of.startswith("{") else _PROMETHEUS_UNITS.get(of, of)
    if not per:
        return word
    return f"{word}_per_{_PER.get(per, per)}".lstrip("_")


def prometheus_label(name: str) -> str:
    """Return an attribute's name as a label's."""
    return _NOT_IN_A_NAME.sub("_", name).strip("_")
