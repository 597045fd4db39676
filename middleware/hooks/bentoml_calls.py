"""What a BentoML service tells another one that it calls: who its parent is."""

from __future__ import annotations

import sys
from typing import Any

from bentoml._internal.configuration.containers import BentoMLContainer

from stagescope import recorder_format as fmt
from stagescope.identity import format_traceparent
from stagescope.middleware.batches import batch
from stagescope.middleware.timeline import Timeline, current


def traceparent(running: batch | None) -> str | None:
    """Give the `traceparent` of the present request, else of the *running* batch.

    None outside of both, and where a span of BentoML's own tracing is the parent. That makes
    spans also where it exports none: as a parent, nobody would ever see them.
    """
    timeline = current.get() or (running.timeline if running else None)
    if timeline is None or timeline.done or _span_exported():
        return None
    return format_traceparent(
        timeline.trace_id.hex(), timeline.span_id.hex(), sampled=_sampled(timeline)
    )


def _span_exported() -> bool:
    if not BentoMLContainer.tracing.exporter_type.get():
        return False
    trace: Any = sys.modules.get("opentelemetry.trace")
    return trace is not None and bool(trace.get_current_span().is_recording())


def _sampled(timeline: Timeline) -> bool:
    return bool(timeline.slot.raw[fmt.OPENED_AT + 2] & fmt.FLAG_SAMPLED)
