"""An OTLP receiver for tests: real sockets, real protobuf, and the faults of real back ends."""

from __future__ import annotations

import base64
import gzip
import json
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NoReturn, Self

import grpc  # type: ignore[import-untyped]
from google.protobuf.duration_pb2 import Duration  # type: ignore[import-untyped]
from google.protobuf.json_format import ParseDict  # type: ignore[import-untyped]
from google.rpc.error_details_pb2 import RetryInfo  # type: ignore[import-untyped]
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2_grpc import (
    MetricsServiceServicer,
    add_MetricsServiceServicer_to_server,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from tests.support.otlp_points import ReceivedPoint, attributes, received_points

_HTTP_UNAVAILABLE = 503
_HTTP_TOO_MANY = 429


class Behaviour(Enum):
    """How the receiver meets a request."""

    OK = "ok"
    REFUSE = "refuse"
    """503, or gRPC UNAVAILABLE."""
    THROTTLE = "throttle"
    """429 with Retry-After, or gRPC RESOURCE_EXHAUSTED with RetryInfo; both `retry_after_s`."""
    HANG = "hang"
    """Takes the request and answers nothing until the behaviour changes or it is closed."""
    CLOSE = "close"
    """Closes the connection without an answer; gRPC cannot from here, and aborts the call."""


@dataclass(frozen=True, slots=True)
class ReceivedSpan:
    """One span as it came in; ids in lower-case hex, times in ns since the Unix epoch."""

    resource: Mapping[str, Any]
    scope: str
    name: str
    kind: str
    """OpenTelemetry's word in lower case: server, internal."""
    trace_id: str
    span_id: str
    parent_span_id: str
    start_ns: int
    end_ns: int
    attributes: Mapping[str, Any]
    links: tuple[tuple[str, str], ...]
    """(trace id, span id) of each."""
    status: str
    """unset, ok or error."""
    message: str
    events: int
    trace_state: str = ""


@dataclass(frozen=True, slots=True)
class Delivery:
    """One request that was taken: its way, its encoding, its headers (lower-case names)."""

    protocol: str
    """`grpc`, `http/protobuf` or `http/json`."""
    encoding: str
    headers: Mapping[str, str]
    spans: int
    points: int = 0
    at_s: float = 0.0
    """When it came, on the monotonic clock."""


class OtlpReceiver:
    """Listens on two free loopback ports, one for OTLP/HTTP and one for OTLP/gRPC.

    Takes traces as protobuf or JSON and metrics as protobuf, plain, gzip or deflate, and keeps
    what it took in memory. It does no TLS, no authentication, no logs, keeps no event contents or dropped counts, and bounds nothing.
    """

    def __init__(self, *, retry_after_s: int = 60) -> None:
        self.retry_after_s = retry_after_s
        self.attempts = 0
        """Requests that came in, taken or not."""
        self.rejected_spans = 0
        """How many spans of each request it says it rejects, and keeps nevertheless."""
        self._behaviour = Behaviour.OK
        self._spans: list[ReceivedSpan] = []
        self._points: list[ReceivedPoint] = []
        self._deliveries: list[Delivery] = []
        self._changed = threading.Condition()
        self._closed = False
        self._http = _HttpServer(self)
        self._http_thread = threading.Thread(target=self._http.serve_forever, args=(0.02,))
        self._http_thread.start()
        self._grpc_threads = ThreadPoolExecutor(4)
        self._grpc = grpc.server(self._grpc_threads, options=(("grpc.so_reuseport", 0),))
        add_TraceServiceServicer_to_server(_Service(self), self._grpc)  # type: ignore[no-untyped-call]
        add_MetricsServiceServicer_to_server(_MetricsService(self), self._grpc)  # type: ignore[no-untyped-call]
        self._grpc_port = self._grpc.add_insecure_port("127.0.0.1:0")
        self._grpc.start()

    @property
    def http_endpoint(self) -> str:
        """What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to for HTTP."""
        return f"http://127.0.0.1:{self._http.server_port}"

    @property
    def grpc_endpoint(self) -> str:
        """What `OTEL_EXPORTER_OTLP_ENDPOINT` is set to for gRPC."""
        return f"http://127.0.0.1:{self._grpc_port}"

    @property
    def spans(self) -> list[ReceivedSpan]:
        """What was taken so far, in the order of its coming."""
        with self._changed:
            return list(self._spans)

    @property
    def points(self) -> list[ReceivedPoint]:
        """The points of metrics that were taken so far, in the order of their coming."""
        with self._changed:
            return list(self._points)

    @property
    def deliveries(self) -> list[Delivery]:
        """The requests that were taken so far."""
        with self._changed:
            return list(self._deliveries)

    def behave(self, behaviour: Behaviour) -> None:
        """Meet requests so from now on; those that hang are let go."""
        with self._changed:
            self._behaviour = behaviour
            self._changed.notify_all()

    def close(self) -> None:
        """Stop listening; requests that hang end without an answer."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._http.shutdown()
        self._http_thread.join()
        self._http.server_close()
        self._grpc.stop(0.2).wait()
        self._grpc_threads.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def meet(self) -> Behaviour:
        """Count an attempt and give how it is met, once that is not HANG. Called by the servers."""
        with self._changed:
            self.attempts += 1
            self._changed.wait_for(lambda: self._closed or self._behaviour is not Behaviour.HANG)
            return Behaviour.CLOSE if self._closed else self._behaviour

    def answer(self) -> ExportTraceServiceResponse:
        """Return what is answered to spans. Called by the servers."""
        answer = ExportTraceServiceResponse()
        answer.partial_success.rejected_spans = self.rejected_spans
        return answer

    def take(
        self,
        request: ExportTraceServiceRequest | ExportMetricsServiceRequest,
        protocol: str,
        encoding: str,
        headers: Mapping[str, str],
    ) -> None:
        """Keep what came in. Called by the servers."""
        spans: list[ReceivedSpan] = []
        points: list[ReceivedPoint] = []
        if isinstance(request, ExportTraceServiceRequest):
            spans = list(received_spans(request))
        else:
            points = list(received_points(request))
        with self._changed:
            self._spans += spans
            self._points += points
            self._deliveries.append(
                Delivery(protocol, encoding, headers, len(spans), len(points), time.monotonic())
            )
            self._changed.notify_all()


def received_spans(request: ExportTraceServiceRequest) -> Iterator[ReceivedSpan]:
    """Yield the spans of an OTLP request."""
    for of_resource in request.resource_spans:
        resource = attributes(of_resource.resource.attributes)
        for of_scope in of_resource.scope_spans:
            for span in of_scope.spans:
                yield _received(span, resource, of_scope.scope.name)


Request = ExportTraceServiceRequest | ExportMetricsServiceRequest


def request_from_json(text: bytes, kind: type[Request]) -> Request:
    """Read OTLP's JSON, in which ids are hex where protobuf's own JSON has base64."""
    request = kind()
    ParseDict(_with_base64_ids(json.loads(text)), request, ignore_unknown_fields=True)
    return request


def _with_base64_ids(value: Any) -> Any:
    if isinstance(value, list):
        return [_with_base64_ids(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: base64.b64encode(bytes.fromhex(item)).decode()
        if key in ("traceId", "spanId", "parentSpanId")
        else _with_base64_ids(item)
        for key, item in value.items()
    }


def _received(span: Span, resource: Mapping[str, Any], scope: str) -> ReceivedSpan:
    return ReceivedSpan(
        resource=resource,
        scope=scope,
        name=span.name,
        kind=Span.SpanKind.Name(span.kind).removeprefix("SPAN_KIND_").lower(),
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex(),
        start_ns=span.start_time_unix_nano,
        end_ns=span.end_time_unix_nano,
        attributes=attributes(span.attributes),
        links=tuple((link.trace_id.hex(), link.span_id.hex()) for link in span.links),
        status=Status.StatusCode.Name(span.status.code).removeprefix("STATUS_CODE_").lower(),
        message=span.status.message,
        events=len(span.events),
        trace_state=span.trace_state,
    )


class _Service(TraceServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(
        self, request: ExportTraceServiceRequest, context: Any
    ) -> ExportTraceServiceResponse:
        _meet_call(self._receiver, request, context)
        return self._receiver.answer()


class _MetricsService(MetricsServiceServicer):
    def __init__(self, receiver: OtlpReceiver) -> None:
        self._receiver = receiver

    def Export(
        self, request: ExportMetricsServiceRequest, context: Any
    ) -> ExportMetricsServiceResponse:
        _meet_call(self._receiver, request, context)
        return ExportMetricsServiceResponse()


def _meet_call(
    receiver: OtlpReceiver,
    request: ExportTraceServiceRequest | ExportMetricsServiceRequest,
    context: Any,
) -> None:
    match receiver.meet():
        case Behaviour.OK:
            pass
        case Behaviour.REFUSE:
            _abort(context, grpc.StatusCode.UNAVAILABLE, "told to refuse")
        case Behaviour.THROTTLE:
            wait = RetryInfo(retry_delay=Duration(seconds=receiver.retry_after_s))
            context.set_trailing_metadata((("google.rpc.retryinfo-bin", wait.SerializeToString()),))
            _abort(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "told to throttle")
        case _:
            _abort(context, grpc.StatusCode.ABORTED, "told to close")
    headers = dict(context.invocation_metadata())
    receiver.take(request, "grpc", headers.get("grpc-encoding", ""), headers)


def _abort(context: Any, code: grpc.StatusCode, why: str) -> NoReturn:
    context.abort(code, why)
    raise AssertionError("abort raises")


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, receiver: OtlpReceiver) -> None:
        self.receiver = receiver
        super().__init__(("127.0.0.1", 0), _HttpHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of a client that left while it was being answered."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 1.0
    """An idle kept-alive connection ends after this, so that its thread does."""
    server: _HttpServer

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        receiver = self.server.receiver
        match receiver.meet():
            case Behaviour.OK:
                self._take(body)
            case Behaviour.REFUSE:
                self._answer(_HTTP_UNAVAILABLE)
            case Behaviour.THROTTLE:
                self._answer(_HTTP_TOO_MANY, ("Retry-After", str(receiver.retry_after_s)))
            case _:
                self.close_connection = True

    def _take(self, body: bytes) -> None:
        if self.path not in ("/v1/traces", "/v1/metrics"):
            self._answer(404)
            return
        encoding = self.headers.get("content-encoding", "")
        if encoding in ("gzip", "deflate"):
            body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
        as_json = self.headers.get("content-type", "").startswith("application/json")
        metrics = self.path == "/v1/metrics"
        kind = ExportMetricsServiceRequest if metrics else ExportTraceServiceRequest
        request = request_from_json(body, kind) if as_json else kind.FromString(body)
        headers = {key.lower(): value for key, value in self.headers.items()}
        protocol = "http/json" if as_json else "http/protobuf"
        self.server.receiver.take(request, protocol, encoding, headers)
        answer = b"{}" if as_json else self.server.receiver.answer().SerializeToString()
        self._answer(200, ("Content-Type", headers["content-type"]), answer)

    def _answer(
        self, status: int, header: tuple[str, str] | None = None, body: bytes = b""
    ) -> None:
        self.send_response(status)
        if header:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
