"""The OpenTelemetry span that is already around us, seen without importing OpenTelemetry."""

from __future__ import annotations

import sys
from typing import Any

from stagescope.identity import TraceParent


def outer_span() -> TraceParent | None:
    """Give the current span's identity; None where the app has no OpenTelemetry or no span."""
    trace: Any = sys.modules.get("opentelemetry.trace")
    if trace is None:
        return None
    try:
        if not sys.modules["opentelemetry.context"].get_current():
            return None  # The usual case, in a third of the time.
        context = trace.get_current_span().get_span_context()
    except (AttributeError, KeyError):
        return None  # It is being imported at this moment, by another thread.
    if not context.is_valid:
        return None
    return (
        context.trace_id.to_bytes(16, "big"),
        context.span_id.to_bytes(8, "big"),
        bool(context.trace_flags & 1),
    )
