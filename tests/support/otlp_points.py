"""The points of OTLP metrics as they came in; `OtlpReceiver` reads by this."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
)
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric


@dataclass(frozen=True, slots=True)
class ReceivedPoint:
    """One point of one metric; times in ns since the Unix epoch."""

    resource: Mapping[str, Any]
    name: str
    unit: str
    kind: str
    """`gauge`, `sum` or `histogram`."""
    attributes: Mapping[str, Any]
    start_ns: int
    time_ns: int
    value: float
    """Of a histogram, its sum."""
    count: int = 0
    """Of a histogram; so are the two below."""
    buckets: tuple[int, ...] = ()
    bounds: tuple[float, ...] = ()
    cumulative: bool = False
    """Of a sum or a histogram."""
    monotonic: bool = False
    """Of a sum."""


def received_points(request: ExportMetricsServiceRequest) -> Iterator[ReceivedPoint]:
    """Yield the points of an OTLP request."""
    for of_resource in request.resource_metrics:
        resource = attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_metrics:
            for metric in of_scope.metrics:
                yield from _points(metric, resource)


def _points(metric: Metric, resource: Mapping[str, Any]) -> Iterator[ReceivedPoint]:
    kind = metric.WhichOneof("data") or ""
    data = getattr(metric, kind)
    for point in data.data_points:
        histogram = kind == "histogram"
        yield ReceivedPoint(
            resource=resource,
            name=metric.name,
            unit=metric.unit,
            kind=kind,
            attributes=attributes(point.attributes),
            start_ns=point.start_time_unix_nano,
            time_ns=point.time_unix_nano,
            value=point.sum if histogram else getattr(point, point.WhichOneof("value")),
            count=point.count if histogram else 0,
            buckets=tuple(point.bucket_counts) if histogram else (),
            bounds=tuple(point.explicit_bounds) if histogram else (),
            cumulative=kind != "gauge" and data.aggregation_temporality == 2,
            monotonic=kind == "sum" and data.is_monotonic,
        )


def attributes(pairs: Any) -> dict[str, Any]:
    """Return OTLP's pairs as a dict of plain values."""
    return {pair.key: _value(pair.value) for pair in pairs if isinstance(pair, KeyValue)}


def _value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(item) for item in value.array_value.values]
    return getattr(value, kind) if kind else None
