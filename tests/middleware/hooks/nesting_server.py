"""A FastAPI server with OpenTelemetry in the way that is asked for, and one client: told as JSON.

A process of its own, because a process has one tracer provider for good.
Usage: python nesting_server.py MODE SPOOL
"""

from __future__ import annotations

import json
import sys
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from fastapi import FastAPI
from opentelemetry import trace
from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased

from stagescope import stage
from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.hooks.hook import install_loaded
from stagescope.middleware.hooks.installer import WEB_FRAMEWORKS
from stagescope.testing import wait_until
from stagescope.testing.recording import Recording
from tests.support.serving import served

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def main(mode: str, spool: Path) -> None:
    """Serve two requests, the first with a `traceparent`, and print what was made of them."""
    finished = InMemorySpanExporter()
    if mode != "none":
        provider = TracerProvider(sampler=ParentBased(ALWAYS_OFF) if "unsampled" in mode else None)
        provider.add_span_processor(SimpleSpanProcessor(finished))
        trace.set_tracer_provider(provider)
    recording = Recording(spool)
    app = FastAPI(telemetry=None if "native" in mode else {"tracing": False})
    tracer = trace.get_tracer("app")

    @app.get("/work")
    def work() -> dict[str, str]:
        with stage("inference"), tracer.start_as_current_span("model"):
            pass
        with tracer.start_as_current_span("after"):
            return {}

    if "contrib" in mode:
        FastAPIInstrumentor.instrument_app(app)
    served_app: Any = app
    install_loaded(WEB_FRAMEWORKS)
    if "inside" in mode:
        app.add_middleware(_Within, recorder=recording.recorder)
    else:
        served_app = StageMiddleware.around(app, recording.recorder)
    with served(served_app) as port:
        for headers in ({"traceparent": PARENT}, {}):
            connection = HTTPConnection("127.0.0.1", port, timeout=10)
            connection.request("GET", "/work", headers=headers)
            assert connection.getresponse().status == 200
            connection.close()
        wait_until(lambda: len(recording.requests) == 2)
    print(json.dumps({
        "spans": [
            {"name": s.name, "kind": s.kind.name, "trace": f"{s.context.trace_id:032x}",
             "id": f"{s.context.span_id:016x}", "parent": f"{s.parent.span_id:016x}" if s.parent else ""}
            for s in finished.get_finished_spans() if s.context
        ],
        "records": [
            {"trace": r.trace_id, "id": r.span_id, "parent": r.parent_span_id,
             "internal": r.internal, "nested": r.nested, "sampled": r.sampled,
             "stages": [(s.stage, s.start_ns) for s in r.stages]}
            for r in recording.requests
        ],
    }))  # fmt: skip
    recording.close()


class _Within:
    """The middleware as `add_middleware` puts it, on a recorder of ours."""

    def __init__(self, app: Any, recorder: Any) -> None:
        self._timed = StageMiddleware.around(app, recorder)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        await self._timed(scope, receive, send)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
