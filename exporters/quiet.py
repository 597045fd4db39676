"""Keeps our own sending out of the log and out of the traces of the process that it runs in."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Generator
from contextlib import contextmanager
from typing import Final

from opentelemetry import context

CHATTY: Final = (
    "opentelemetry.exporter.otlp.common.http",
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.exporter.otlp.proto.grpc.metric_exporter",
    "opentelemetry.exporter.otlp.proto.grpc.trace_exporter",
    "opentelemetry.exporter.otlp.proto.http",
    "opentelemetry.exporter.otlp.proto.http.metric_exporter",
    "opentelemetry.exporter.otlp.proto.http.trace_exporter",
    "urllib3.connectionpool",
)
"""Loggers that would say the same at every failed attempt."""


@contextmanager
def taken_log_records() -> Generator[deque[str]]:
    """Take what the exporters log on this thread; gives their newest messages.

    What they log on other threads, for the app's own spans, stays as it is.
    """
    own = threading.get_ident()
    said: deque[str] = deque(maxlen=4)

    def take(record: logging.LogRecord) -> bool:
        if record.thread != own:
            return True
        if record.levelno >= logging.WARNING:
            said.append(record.getMessage())
        return False

    loggers = [logging.getLogger(name) for name in CHATTY]
    for logger in loggers:
        # First in the list: OpenTelemetry's filter of duplicates would hide them from us.
        logger.filters.insert(0, take)
    try:
        yield said
    finally:
        for logger in loggers:
            logger.removeFilter(take)


@contextmanager
def suppressed_instrumentation() -> Generator[None]:
    """Make no spans of our own requests where the app has instrumented its HTTP client."""
    suppressed = context.get_current()
    for named in ("_SUPPRESS_INSTRUMENTATION_KEY", "_SUPPRESS_HTTP_INSTRUMENTATION_KEY"):
        # Made at import under a random name, and public nowhere in what we depend on.
        if key := getattr(context, named, None):
            suppressed = context.set_value(key, True, suppressed)
    token = context.attach(suppressed)
    try:
        yield
    finally:
        context.detach(token)
