"""One variant under a real uvicorn: `python benchmarks/overhead_server.py VARIANT`.

Prints its port, serves until SIGTERM. `GET /cpu` gives the CPU time that the process has used so
far, all threads together, in ns; it is answered outside the instrument.
"""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import time
from pathlib import Path

import uvicorn

from stagescope.middleware.types import ASGIApp, Receive, Scope, Send


def build(variant: str) -> ASGIApp:
    """Return the app of *variant*; a spool and an OTLP endpoint come in the environment."""
    from overhead_apps import def_app, marked, plain

    if variant == "bare":
        return plain
    if variant == "def-bare":
        return def_app()
    if variant == "otel-otlp":
        return _otel()
    from stagescope.face import StageMiddleware as WithAgent
    from stagescope.middleware.asgi import StageMiddleware
    from stagescope.middleware.stage import stage

    spool = Path(os.environ["STAGESCOPE_SPOOL"])
    if variant == "agent-thread":
        return WithAgent(marked(stage), spool=spool)
    if variant.startswith("def-"):
        from stagescope.middleware.hooks.installer import FrameworkHooks

        return StageMiddleware(def_app(), spool=spool, installer=FrameworkHooks())
    return StageMiddleware(marked(stage), spool=spool)


def _otel() -> ASGIApp:
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from overhead_apps import marked

    provider = TracerProvider()
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    mark = provider.get_tracer("app").start_as_current_span
    return OpenTelemetryMiddleware(marked(mark), tracer_provider=provider)


def with_cpu(app: ASGIApp) -> ASGIApp:
    """Answer `/cpu` before *app* sees it."""

    async def answered(scope: Scope, receive: Receive, send: Send) -> None:
        if scope.get("path") != "/cpu":
            await app(scope, receive, send)
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        body = str(time.process_time_ns()).encode()
        await send({"type": "http.response.body", "body": body})

    return answered


def main() -> None:
    """Serve on a free port of the loopback."""
    listener = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        with_cpu(build(sys.argv[1])), log_level="warning", access_log=False, lifespan="off"
    )
    print(listener.getsockname()[1], flush=True)
    asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


if __name__ == "__main__":
    main()
