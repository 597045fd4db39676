"""The load driver as the back end of a model server's spans."""

from __future__ import annotations

import http.client
import socket

import pytest
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter as GrpcExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter as HttpExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExporter

from stagescope.errors import StagescopeError, UsageError
from stagescope.load_run.otlp_receiver import Endpoint, OtlpInbox, endpoint

HERE = "127.0.0.1"


def send_one(exporter: SpanExporter) -> None:
    """Send one span as a server does."""
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    provider.get_tracer("t").start_span("one").end()
    provider.shutdown()


def test_both_protocols_are_taken() -> None:
    """OpenTelemetry's own exporters deliver by gRPC and by HTTP, compressed or not."""
    with OtlpInbox([Endpoint("grpc", HERE, 0), Endpoint("http", HERE, 0)]) as inbox:
        by_grpc, by_http = inbox.urls
        send_one(GrpcExporter(by_grpc, insecure=True))
        send_one(HttpExporter(f"{by_http}/v1/traces"))
        assert inbox.spans == 2
        assert len(inbox.exports()) == 2


@pytest.mark.parametrize(
    ("path", "headers", "body", "status"),
    [
        ("/v1/traces", {"content-type": "application/json"}, b'{"resourceSpans": []}', 200),
        ("/v1/traces", {}, b"\xff\xff no protobuf", 429),
        ("/v1/traces", {"content-type": "application/json"}, b"{", 429),
        ("/v1/traces", {"content-encoding": "gzip"}, b"no gzip", 400),
        ("/v1/traces", {"content-encoding": "brotli"}, b"", 415),
        ("/v1/metrics", {}, b"", 404),
        ("/v1/traces", {"content-length": "999999999999"}, b"", 413),
        ("/v1/traces", {"content-length": "many"}, b"", 413),
    ],
)
def test_what_is_no_export_is_answered_so(
    path: str, headers: dict[str, str], body: bytes, status: int
) -> None:
    """Each kind of nonsense has its status, and the next span is taken."""
    with OtlpInbox([Endpoint("http", HERE, 0)]) as inbox:
        host = inbox.urls[0].removeprefix("http://")
        connection = http.client.HTTPConnection(host, timeout=5)
        connection.request("POST", path, body, headers)
        assert connection.getresponse().status == status
        connection.close()
        send_one(HttpExporter(f"{inbox.urls[0]}/v1/traces"))
        assert inbox.spans == 1


def test_a_port_that_is_taken_is_one_sentence() -> None:
    """It names the option and the address; nothing is left listening."""
    with socket.socket() as other:
        other.bind((HERE, 0))
        other.listen()
        port = other.getsockname()[1]
        for protocol in ("grpc", "http"):
            with pytest.raises(StagescopeError, match=f"--otlp-listen {protocol}://{HERE}:{port}"):
                OtlpInbox([Endpoint("http", HERE, 0), Endpoint(protocol, HERE, port)])


def test_addresses_are_read() -> None:
    """A scheme is wanted, a port is not; the rest is refused with an example."""
    assert endpoint("grpc://h") == Endpoint("grpc", "h", 4317)
    assert endpoint("http://[::1]:0") == Endpoint("http", "::1", 0)
    for wrong in ("4317", "localhost:4317", "ftp://h", "http://", "http://h:many"):
        with pytest.raises(UsageError, match="neither grpc://HOST:PORT nor http://HOST:PORT"):
            endpoint(wrong)
