"""OTLP spans as plain data, from either of their forms: JSON objects and protobuf messages.

Format: https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding (ids are hex in JSON, bytes
in protobuf; 64-bit numbers are text in JSON). protobuf itself is not needed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stagescope.errors import StagescopeError
from stagescope.runfolder.rows import row_without_record
from stagescope.stages import partition, stage_of

Attributes = Mapping[str, str | int | float | bool]

ERROR_STATUS = 2
"""`STATUS_CODE_ERROR` of a span."""


@dataclass(frozen=True, slots=True)
class OtlpSpan:
    """One span; times are ns since the Unix epoch."""

    trace_id: str
    span_id: str
    parent_span_id: str
    name: str
    start_wall_ns: int
    end_wall_ns: int
    attributes: Attributes
    events: Mapping[str, int]
    """When each named event was; of several with one name, the last."""
    failed: bool
    resource: Attributes


def spans_of(export: Any) -> Iterator[OtlpSpan]:
    """Yield the spans of an `ExportTraceServiceRequest`, in JSON (a mapping) or protobuf.

    Raises StagescopeError where a span is not one.
    """
    for resource_spans in _field(export, "resource_spans", ()):
        resource = _attributes(_field(_field(resource_spans, "resource", {}), "attributes", ()))
        for scope_spans in _field(resource_spans, "scope_spans", ()):
            for span in _field(scope_spans, "spans", ()):
                yield parse_span(span, resource)


def parse_span(span: Any, resource: Attributes | None = None) -> OtlpSpan:
    """Read one span, in JSON (a mapping) or protobuf.

    Raises StagescopeError where ids or times are missing or none.
    """
    try:
        return OtlpSpan(
            trace_id=_id(_field(span, "trace_id"), 16),
            span_id=_id(_field(span, "span_id"), 8),
            parent_span_id=_id(_field(span, "parent_span_id", ""), 8, optional=True),
            name=str(_field(span, "name", "")),
            start_wall_ns=int(_field(span, "start_time_unix_nano")),
            end_wall_ns=int(_field(span, "end_time_unix_nano")),
            attributes=_attributes(_field(span, "attributes", ())),
            events={
                str(_field(event, "name")): int(_field(event, "time_unix_nano"))
                for event in _field(span, "events", ())
            },
            failed=_field(_field(span, "status", {}), "code", 0) in (ERROR_STATUS, "STATUS_CODE_ERROR"),
            resource=resource or {},
        )  # fmt: skip
    except (KeyError, AttributeError, TypeError, ValueError) as problem:
        raise StagescopeError(f"this is no OTLP span: {problem!r}") from problem


_REQUIRED = object()


def _field(message: Any, name: str, default: Any = _REQUIRED) -> Any:
    if not isinstance(message, Mapping):
        return getattr(message, name) if default is _REQUIRED else getattr(message, name, default)
    head, *words = name.split("_")
    camel = head + "".join(word.capitalize() for word in words)
    return message[camel] if default is _REQUIRED else message.get(camel, default)


def _id(value: Any, length: int, *, optional: bool = False) -> str:
    text = value.hex() if isinstance(value, bytes) else str(value).lower()
    if not text and optional:
        return ""
    if len(bytes.fromhex(text)) != length:
        raise ValueError(f"an id of {length} bytes is wanted, not {value!r}")
    return text


def _attributes(pairs: Iterable[Any]) -> Attributes:
    return {
        str(_field(pair, "key")): value
        for pair in pairs
        if (value := _value(_field(pair, "value"))) is not None
    }


def _value(value: Any) -> str | int | float | bool | None:
    """Return a plain value; None for lists and maps, which are not used here."""
    if not isinstance(value, Mapping):
        kind = value.WhichOneof("value")
        return getattr(value, kind) if kind and kind.removesuffix("_value") in _PLAIN else None
    for kind, read in _PLAIN.items():
        if (found := value.get(f"{kind}Value")) is not None:
            plain: str | int | float | bool = read(found)
            return plain
    return None


_PLAIN = {"string": str, "int": int, "double": float, "bool": bool}


# Spans that model servers write themselves, as rows of the `server` table: read, not made again.
#
# - vLLM and SGLang: one span a request with `gen_ai.latency.*` attributes, in seconds.
# - Triton: three spans a request with events such as `QUEUE_START`.
#
# Names of the attributes: `SpanAttributes` of vllm/tracing and of sglang/srt/observability/trace.
# Names of the events: the user guide of Triton's trace extension.


SOURCE = "otlp"

Interval = tuple[str, int, int]
"""Stage, start and end, ns since the row's start."""

_LATENCY = "gen_ai.latency."
_QUEUE = _LATENCY + "time_in_queue"
_FIRST_TOKEN = _LATENCY + "time_to_first_token"
_PREFILL = _LATENCY + "time_in_model_prefill"
_DECODE = _LATENCY + "time_in_model_decode"
_INFERENCE = _LATENCY + "time_in_model_inference"
_E2E = _LATENCY + "e2e"


def server_rows(spans: Iterable[OtlpSpan]) -> Iterator[dict[str, Any]]:
    """Yield a row of the `server` table for each request in *spans*.

    Spans of other kinds are passed over. A request of Triton's needs its three spans together.
    Rows have wall times only: `start_ns` is 0 and `boot_id` empty, so clocks count as different.
    """
    models: list[OtlpSpan] = []
    by_parent: dict[str, OtlpSpan] = {}
    by_id: dict[str, OtlpSpan] = {}
    for span in spans:
        by_id[span.span_id] = span
        if span.parent_span_id and "COMPUTE_START" in span.events:
            by_parent[span.parent_span_id] = span
        if "QUEUE_START" in span.events:
            models.append(span)
        elif (row := llm_row(span)) is not None:
            yield row
    for model in models:
        yield triton_row(model, by_id.get(model.parent_span_id), by_parent.get(model.span_id))


def llm_row(span: OtlpSpan) -> dict[str, Any] | None:
    """Return the row of a request span of vLLM's or SGLang's; None for any other span.

    vLLM tells how long each part took, not when it was: the first token stands at its time since
    the arrival, prefill ends there, the queue ends where prefill begins, decode follows. What is
    left (reading the prompt, between processes, writing the answer) is `other`. SGLang gives no
    queue, and counts it as prefill. Lengths that cannot be (negative, endless) count as 0.
    """
    if _E2E not in span.attributes and _FIRST_TOKEN not in span.attributes:
        return None
    queue, prefill, decode = (_ns(span, name) for name in (_QUEUE, _PREFILL, _DECODE))
    first_token = _ns(span, _FIRST_TOKEN) or queue + prefill
    if not prefill and not decode:
        prefill = _ns(span, _INFERENCE)  # A version that tells only their sum.
    duration = max(_ns(span, _E2E), span.end_wall_ns - span.start_wall_ns, 0)
    began = max(0, first_token - prefill)
    waited = max(0, began - queue)
    intervals = [
        ("queue", waited, began),
        ("inference.prefill", began, began + prefill),
        ("inference.decode", began + prefill, began + prefill + decode),
    ]
    return _row(span, span.start_wall_ns, duration, intervals, first_byte_ns=first_token)


def triton_row(
    model: OtlpSpan, request: OtlpSpan | None, compute: OtlpSpan | None
) -> dict[str, Any]:
    """Return the row of a request of Triton's from its spans: of the model, around, and within.

    Exact: they hold the moments. `queue` is Triton's scheduler, where its dynamic batcher waits
    for companions too; `inference` is the model's execution with its inputs and outputs.
    """
    outer = request or model
    events = {**outer.events, **model.events, **(compute.events if compute else {})}
    # Reading the request begins before the span that is around all.
    start = min(outer.start_wall_ns, *events.values())
    edges = [
        ("preprocess.read", "HTTP_RECV_START", "HTTP_RECV_END"),
        ("queue", "QUEUE_START", "COMPUTE_START"),
        ("inference.h2d", "COMPUTE_START", "COMPUTE_INPUT_END"),
        ("inference.forward", "COMPUTE_INPUT_END", "COMPUTE_OUTPUT_START"),
        ("inference.d2h", "COMPUTE_OUTPUT_START", "COMPUTE_END"),
        ("respond", "HTTP_SEND_START", "HTTP_SEND_END"),
    ]
    intervals = [
        (stage, events[first] - start, events[last] - start)
        for stage, first, last in edges
        if first in events and last in events
    ]
    intervals.sort(key=lambda interval: interval[1])
    return _row(outer, start, outer.end_wall_ns - start, intervals)


def _ns(span: OtlpSpan, name: str) -> int:
    value = span.attributes.get(name, 0)
    seconds = float(value) if isinstance(value, (int, float)) else 0.0
    return round(seconds * 1e9) if 0 < seconds < 1e6 else 0


def _row(
    span: OtlpSpan, start: int, duration: int, intervals: list[Interval], *, first_byte_ns: int = 0
) -> dict[str, Any]:
    within = [
        (stage, min(first, duration), min(last, duration)) for stage, first, last in intervals
    ]
    charged, _ = partition([(first, last) for _, first, last in within], duration)
    sums: Counter[str] = Counter()
    for (stage, _, _), spent in zip(within, charged, strict=True):
        sums[stage_of(stage)] += spent
    resource = span.resource
    return row_without_record(
        sums,
        duration,
        trace_id=span.trace_id,
        span_id=span.span_id,
        parent_span_id=span.parent_span_id,
        ring_id=str(resource.get("service.instance.id", "")),
        seq=-1,
        pid=int(resource.get("process.pid", 0)),
        service=str(resource.get("service.name", "")),
        host=str(resource.get("host.name", "")),
        start_wall_ns=start,
        stages=[
            {"stage": stage, "start_ns": first, "end_ns": last, "self_ns": spent,
             "failed": span.failed and stage.startswith("inference")}
            for (stage, first, last), spent in zip(within, charged, strict=True)
            if last > first
        ],
        error=str(span.attributes.get("error.type", "error")) if span.failed else "",
        first_byte_ns=min(first_byte_ns, duration),
        source=SOURCE,
    )  # fmt: skip
