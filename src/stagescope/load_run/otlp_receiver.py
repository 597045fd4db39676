"""Takes the spans that a model server sends by OTLP while it is loaded, and keeps them until asked.

For servers that time themselves (vLLM, SGLang, Triton): the load driver is their back end for the
length of a run, so no other is needed. OTLP over gRPC and over HTTP, traces alone:
https://opentelemetry.io/docs/specs/otlp/
"""

from __future__ import annotations

import gzip
import json
import threading
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self, cast
from urllib.parse import urlsplit

import grpc  # type: ignore[import-untyped]
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from stagescope.errors import StagescopeError, UsageError

_DEFAULT_PORT = {"grpc": 4317, "http": 4318}


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where to listen: `grpc` or `http`, host, port (0 picks one)."""

    protocol: str
    host: str
    port: int


def endpoint(text: str) -> Endpoint:
    """Read `grpc://HOST:PORT`, `http://HOST:PORT`, or either without a port.

    Raises UsageError for anything else.
    """
    try:
        url = urlsplit(text)
        protocol, host, port = url.scheme, url.hostname, url.port
    except ValueError:
        protocol, host, port = "", None, None
    if protocol not in _DEFAULT_PORT or not host:
        raise UsageError(f"--otlp-listen {text!r} is neither grpc://HOST:PORT nor http://HOST:PORT")
    return Endpoint(protocol, host, _DEFAULT_PORT[protocol] if port is None else port)


MAX_EXPORTS_BYTES = 512 << 20
"""What a run's spans may take in memory; further exports are refused, and counted."""
MAX_BODY_BYTES = 64 << 20
_METHOD = "opentelemetry.proto.collector.trace.v1.TraceService"
_DECODERS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    "identity": bytes,
    "gzip": gzip.decompress,
    "deflate": zlib.decompress,
}


class OtlpInbox:
    """Listens until it is closed; use it with `with`.

    Raises StagescopeError where an address cannot be had.
    """

    def __init__(self, endpoints: Sequence[Endpoint]) -> None:
        self._exports: list[Any] = []
        self._bytes = 0
        self.spans = 0
        """Spans that came, of whatever kind and trace."""
        self.refused = 0
        """Exports that found no room, or were none."""
        self.urls: list[str] = []
        """Where it listens: the endpoint to set in the model server."""
        self._lock = threading.Lock()
        with ExitStack() as opened:
            for each in endpoints:
                listen = self._listen_grpc if each.protocol == "grpc" else self._listen_http
                port = listen(each, opened)
                self.urls.append(f"http://{each.host}:{port}")
            self._opened = opened.pop_all()

    def exports(self) -> list[Any]:
        """Return what came so far: protobuf messages, and mappings where it was JSON."""
        with self._lock:
            return list(self._exports)

    def take(self, body: bytes, *, as_json: bool) -> bool:
        """Keep one export; False where there is no room for it, or it is not an export."""
        try:
            export = json.loads(body) if as_json else ExportTraceServiceRequest.FromString(body)
        except Exception:  # noqa: BLE001 - protobuf's DecodeError has no public base
            export = None
        with self._lock:
            if export is None or self._bytes + len(body) > MAX_EXPORTS_BYTES:
                self.refused += 1
                return False
            self._bytes += len(body)
            self._exports.append(export)
            self.spans += _count(export)
        return True

    def _listen_grpc(self, where: Endpoint, opened: ExitStack) -> int:
        threads = opened.enter_context(ThreadPoolExecutor(4))
        server = grpc.server(threads, options=(("grpc.so_reuseport", 0),))
        server.add_generic_rpc_handlers((self._rpc(),))
        try:
            port = cast(int, server.add_insecure_port(f"{where.host}:{where.port}"))
        except RuntimeError:
            raise _taken(where) from None
        server.start()
        opened.callback(lambda: server.stop(0.2).wait())
        return port

    def _rpc(self) -> Any:
        def export(request: bytes, context: Any) -> Any:
            if not self.take(request, as_json=False):
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room for more spans")
            return ExportTraceServiceResponse()

        handler = grpc.unary_unary_rpc_method_handler(
            export, response_serializer=ExportTraceServiceResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(_METHOD, {"Export": handler})

    def _listen_http(self, where: Endpoint, opened: ExitStack) -> int:
        try:
            server = _HttpServer((where.host, where.port), self)
        except OSError:
            raise _taken(where) from None
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), name="otlp-inbox")
        thread.start()
        opened.callback(server.server_close)
        opened.callback(thread.join)
        opened.callback(server.shutdown)
        return server.server_port

    def close(self) -> None:
        """Listen no more; what came is kept."""
        self._opened.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _count(export: Any) -> int:
    if isinstance(export, dict):
        return sum(
            len(scope.get("spans", ()))
            for resource in export.get("resourceSpans", ())
            for scope in resource.get("scopeSpans", ())
        )
    return sum(len(s.spans) for resource in export.resource_spans for s in resource.scope_spans)


def _taken(where: Endpoint) -> StagescopeError:
    return StagescopeError(
        f"--otlp-listen {where.protocol}://{where.host}:{where.port} cannot be listened on: "
        "is a collector there already? choose another port, and tell the model server"
    )


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = False

    def __init__(self, address: tuple[str, int], inbox: OtlpInbox) -> None:
        self.inbox = inbox
        super().__init__(address, _HttpHandler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: a client that leaves is no news, and the progress line is on the screen."""


class _HttpHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 1.0
    """An idle kept-alive connection ends after this, so that its thread does."""
    server: _HttpServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        length = self.headers.get("content-length", "")
        if not length.isdigit() or int(length) > MAX_BODY_BYTES:
            self.close_connection = True
            self._answer(413)
            return
        body = self.rfile.read(int(length))
        decode = _DECODERS.get(self.headers.get("content-encoding", ""))
        if self.path.rstrip("/") != "/v1/traces" or decode is None:
            self._answer(404 if decode else 415)
            return
        as_json = self.headers.get("content-type", "").startswith("application/json")
        try:
            body = decode(body)
        except (OSError, EOFError, zlib.error):
            self._answer(400)
            return
        self._answer(200 if self.server.inbox.take(body, as_json=as_json) else 429)

    def _answer(self, status: int) -> None:
        self.send_response(status)
        self.send_header("Content-Type", self.headers.get("content-type", "text/plain"))
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""
