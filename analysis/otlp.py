"""OTLP spans as plain data, from either of their forms: JSON objects and protobuf messages.

Format: https://opentelemetry.io/docs/specs/otlp/#json-protobuf-encoding (ids are hex in JSON, bytes
in protobuf; 64-bit numbers are text in JSON). protobuf itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stagescope.errors import StagescopeError

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
    """Give the spans of an `ExportTraceServiceRequest`, in JSON (a mapping) or protobuf.

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
    """Give a plain value; None for lists and maps, which nobody here asks for."""
    if not isinstance(value, Mapping):
        kind = value.WhichOneof("value")
        return getattr(value, kind) if kind and kind.removesuffix("_value") in _PLAIN else None
    for kind, read in _PLAIN.items():
        if (found := value.get(f"{kind}Value")) is not None:
            plain: str | int | float | bool = read(found)
            return plain
    return None


_PLAIN = {"string": str, "int": int, "double": float, "bool": bool}
