"""FastAPI with OpenTelemetry's instrumentation, bare and with our one line in both its forms.

A process of its own, because a process has one tracer provider and one propagator for good.
Usage: python propagation_server.py MODE SPOOL; prints what each form answered, spanned and recorded.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Sequence
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from opentelemetry import propagate, trace
from opentelemetry.context import Context
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import Decision, ParentBased, Sampler, SamplingResult
from opentelemetry.trace import Link, SpanKind
from opentelemetry.trace.span import TraceState

from stagescope import StageMiddleware, stage
from stagescope.records import RequestRecord
from stagescope.testing import wait_until
from stagescope.testing.spool import Spool
from tests.support.serving import served

FORMS = ("bare", "add_middleware", "around")
TRACES = ("a" * 32, "c" * 32)
CALLER = "b" * 16
STATE = "dd=s:2;t.dm:-4,ot=th:8"
REQUESTS: dict[str, list[tuple[str, dict[str, str]]]] = {
    "w3c": [
        ("/", {"traceparent": f"00-{trace_id}-{CALLER}-{flags}", "tracestate": STATE})
        for trace_id, flags in zip(TRACES, ("01", "00"), strict=True)
    ],
    "b3": [
        ("/", {"x-b3-traceid": trace_id, "x-b3-spanid": CALLER, "x-b3-sampled": sampled})
        for trace_id, sampled in zip(TRACES, ("1", "0"), strict=True)
    ],
    "by path": [("/health", {}), ("/", {}), ("/health", {})],
    "by route": [("/health", {}), ("/", {}), ("/health", {})],
}


class DropsHealth(Sampler):
    """Drops what it is told to be /health; raises where it is not told what it looks at."""

    def __init__(self, *names: str) -> None:
        self._names = names

    def should_sample(
        self,
        parent_context: Context | None,
        trace_id: int,
        name: str,
        kind: SpanKind | None = None,
        attributes: Any = None,
        links: Sequence[Link] | None = None,
        trace_state: TraceState | None = None,
    ) -> SamplingResult:
        """Say no to /health."""
        (value,) = {attributes[name] for name in self._names if name in attributes}
        drops = kind is SpanKind.SERVER and value == "/health"
        return SamplingResult(Decision.DROP if drops else Decision.RECORD_AND_SAMPLE)

    def get_description(self) -> str:
        """Return its name."""
        return "DropsHealth"


def main(mode: str, spool: Path) -> None:
    """Ask each form the requests of *mode*, and print what came of them."""
    spans = InMemorySpanExporter()
    looks_at = ("http.route",) if mode == "by route" else ("url.path", "http.target")
    sampler = ParentBased(DropsHealth(*looks_at)) if mode.startswith("by") else None
    provider = TracerProvider(sampler=sampler)
    provider.add_span_processor(SimpleSpanProcessor(spans))
    trace.set_tracer_provider(provider)
    told: dict[str, Any] = {}
    for form in FORMS:
        folder = spool / form
        app = instrumented(form, folder)
        if mode == "one connection":
            told[form] = [
                on_one_connection(app, folder, http, pipelined)
                for http in ("h11", "httptools")
                for pipelined in (False, True)
                if form != "bare"
            ]
            continue
        spans.clear()
        requests = REQUESTS[mode]
        with served(app) as port:
            answers = [asked(port, *request) for request in requests]
        told[form] = {
            "answers": answers,
            "spans": [
                [f"{span.context.trace_id:032x}", span.name]
                for span in spans.get_finished_spans()
                if span.context
            ],
            "records": recorded(folder, len(requests)) if form != "bare" else [],
        }
    print(json.dumps(told))


def instrumented(form: str, folder: Path) -> Any:
    """Return the app with its instrumentation, and with our line in *form*."""
    app = FastAPI()

    @app.get("/")
    def called_on() -> list[dict[str, str]]:
        outside: dict[str, str] = {}
        propagate.inject(outside)
        with stage("inference"):
            inside: dict[str, str] = {}
            propagate.inject(inside)
        return [outside, inside]

    @app.get("/health")
    def health() -> list[dict[str, str]]:
        return []

    @app.post("/size")
    async def size(request: Request) -> int:
        return len(await request.body())

    if form == "add_middleware":
        app.add_middleware(StageMiddleware, spool=folder)
    FastAPIInstrumentor.instrument_app(app)
    return StageMiddleware(app, spool=folder) if form == "around" else app


def asked(port: int, path: str, headers: dict[str, str]) -> Any:
    """Ask, and return the headers that the app would call on with, outside and inside a stage."""
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request("GET", path, headers=headers)
        return json.loads(connection.getresponse().read())
    finally:
        connection.close()


def on_one_connection(app: Any, folder: Path, http: str, pipelined: bool) -> list[Any]:
    """Send a large body and then two requests, one of no trace, by one connection; their records."""
    callers = [f"traceparent: 00-{trace_id}-{CALLER}-01\r\n" for trace_id in TRACES]
    requests = [
        f"POST /size HTTP/1.1\r\nhost: t\r\n{caller}content-length: {length}\r\n\r\n".encode()
        + b"x" * length
        for caller, length in zip(
            [*callers, "connection: close\r\n"], (1_000_000, 2, 3), strict=True
        )
    ]
    # asyncio alone hands the context of one request on to the next.
    with (
        served(app, http=http, loop="asyncio") as port,
        socket.create_connection(("127.0.0.1", port), timeout=20) as connection,
    ):
        for request in [b"".join(requests)] if pipelined else requests:
            connection.sendall(request)
            if not pipelined:
                response = HTTPResponse(connection)
                response.begin()
                response.read()
        while pipelined and connection.recv(65536):
            pass
    return recorded(folder, 3)[-3:]


def recorded(folder: Path, count: int) -> list[Any]:
    """Wait for the next *count* records of *folder* and return all, earliest first."""
    reader = Spool(folder)
    expected = _seen.get(folder, 0) + count

    def found() -> list[RequestRecord]:
        records = [record for record in reader.records() if isinstance(record, RequestRecord)]
        return records if len(records) >= expected else []

    try:
        records = wait_until(found, 20)
    finally:
        reader.close()
    _seen[folder] = len(records)
    records.sort(key=lambda record: record.start_ns)
    return [
        {"trace": one.trace_id, "parent": one.parent_span_id, "internal": one.internal,
         "sampled": one.sampled, "path": one.path}
        for one in records
    ]  # fmt: skip


_seen: dict[Path, int] = {}

if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
