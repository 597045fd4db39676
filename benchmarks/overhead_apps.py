"""The app that is measured, bare and inside each instrument."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import (
    BatchSpanProcessor,
    SpanExporter,
    SpanExportResult,
)
from starlette_exporter import PrometheusMiddleware

from stagescope.middleware.asgi import StageMiddleware
from stagescope.middleware.stage import stage
from stagescope.middleware.types import ASGIApp, Message, Receive, Scope, Send

__all__ = [
    "CountingExporter",
    "def_app",
    "fastapi_app",
    "fastapi_apps",
    "marked",
    "plain",
    "raw_apps",
]

Mark = Callable[[str], AbstractContextManager[Any]]

REPLY = json.dumps({"top": [["cat", 0.9], ["dog", 0.1]]}).encode()
START: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(REPLY))],
}


async def plain(scope: Scope, receive: Receive, send: Send) -> None:
    """Read the body and reply."""
    while (await receive()).get("more_body"):
        pass
    await send(START)
    await send({"type": "http.response.body", "body": REPLY})


def marked(mark: Mark) -> ASGIApp:
    """Return `plain` with five marked steps; `respond`, the sixth stage, is the instrument's."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        with mark("preprocess"):
            while (await receive()).get("more_body"):
                pass
        with mark("queue"):
            pass
        with mark("batch"):
            pass
        with mark("inference"):
            pass
        with mark("postprocess"):
            pass
        await send(START)
        await send({"type": "http.response.body", "body": REPLY})

    return app


def fastapi_app(mark: Mark | None, **options: Any) -> FastAPI:
    """Return the same as a FastAPI app, with five marked steps or none."""
    app = FastAPI(**options)

    async def predict(request: Request) -> Response:
        await request.body()
        return Response(REPLY, media_type="application/json")

    async def predict_marked(request: Request) -> Response:
        assert mark is not None
        with mark("preprocess"):
            await request.body()
        with mark("queue"):
            pass
        with mark("batch"):
            pass
        with mark("inference"):
            pass
        with mark("postprocess"):
            return Response(REPLY, media_type="application/json")

    app.post("/predict")(predict if mark is None else predict_marked)
    return app


def def_app() -> FastAPI:
    """Return a FastAPI app whose endpoint is a `def`: it runs in a worker thread."""
    app = FastAPI()

    def predict() -> dict[str, list[str]]:
        return {"top": ["cat", "dog"]}

    app.post("/predict")(predict)
    return app


class CountingExporter(SpanExporter):
    """Takes spans and counts them; sends nothing, which is in OpenTelemetry's favour."""

    def __init__(self) -> None:
        self.spans = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Count a batch of spans."""
        self.spans += len(spans)
        return SpanExportResult.SUCCESS


def traced() -> tuple[TracerProvider, CountingExporter]:
    """Return a provider of its own, with the usual batch processor, for one variant."""
    provider, exporter = TracerProvider(), CountingExporter()
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider, exporter


Built = tuple[ASGIApp, tuple[TracerProvider, CountingExporter] | None]
"""An app, and where its spans go if it makes any."""


def raw_apps(spool: Path) -> dict[str, Built]:
    """Return each instrument around the app in bare ASGI, by the variant's key."""
    without, with_five = traced(), traced()
    mark = with_five[0].get_tracer("app").start_as_current_span
    return {
        "bare": (plain, None),
        "stagescope-0": (StageMiddleware(plain, spool=spool), None),
        "stagescope-6": (StageMiddleware(marked(stage), spool=spool), None),
        "otel-asgi-0": (OpenTelemetryMiddleware(plain, tracer_provider=without[0]), without),
        "otel-asgi-5": (
            OpenTelemetryMiddleware(marked(mark), tracer_provider=with_five[0]),
            with_five,
        ),
    }


def fastapi_apps(spool: Path) -> dict[str, Built]:
    """Return each instrument around the app in FastAPI, by the variant's key."""
    native, contrib = traced(), traced()
    native_mark = native[0].get_tracer("app").start_as_current_span
    contrib_mark = contrib[0].get_tracer("app").start_as_current_span
    exported = fastapi_app(None)
    exported.add_middleware(PrometheusMiddleware, group_paths=True)
    return {
        "fastapi-bare": (fastapi_app(None), None),
        "fastapi-stagescope-6": (
            StageMiddleware(fastapi_app(stage), spool=spool),
            None,
        ),
        "fastapi-starlette-exporter": (exported, None),
        "fastapi-otel-asgi-5": (
            OpenTelemetryMiddleware(fastapi_app(contrib_mark), tracer_provider=contrib[0]),
            contrib,
        ),
        "fastapi-otel-native-5": (
            # Its own provider, passed in: the global one could be set only once a process.
            fastapi_app(native_mark, telemetry={"tracer_provider": native[0]}),
            native,
        ),
    }
