"""Sending the driver's own spans, after the load: nothing of it disturbs a run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.exporters.otlp.environment import TRACES, exporter_asked_for, pointed_at
from stagescope.identity import boot_id
from stagescope.runfolder.schema import SERVER

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan

    from stagescope.exporters.otlp.client_spans import ClientSpanBuilder
    from stagescope.exporters.otlp.transport import Spans, Transport
    from stagescope.loadgen.client_log import ClientLog
    from stagescope.runfolder.run import Run

AT_ONCE = 2_048
"""Spans in one sending."""


def client_transport(otlp: str) -> Transport[Spans] | None:
    """Return where the driver's spans go: *otlp*, else what the `OTEL_*` variables say; else None.

    Raises UsageError, which names the variable, for what cannot be used.
    """
    environ = pointed_at(otlp, os.environ)
    if not exporter_asked_for(TRACES, environ):
        return None  # and nothing of OpenTelemetry is imported
    from stagescope.exporters.otlp.transport import transport_from_environment

    return transport_from_environment(TRACES, environ)


def send_client_spans(transport: Transport[Spans], run: Run, log: ClientLog, folder: Path) -> str:
    """Send the spans of all requests in *log*; return a sentence where some were not taken."""
    from stagescope.exporters.otlp.client_spans import ClientSpanBuilder
    from stagescope.exporters.otlp.transport import suppressed_instrumentation, taken_log_records

    spans = _spans(ClientSpanBuilder(run), log, _server_ends(folder))
    sent, refused, reason = 0, 0, ""
    try:
        with taken_log_records() as said, suppressed_instrumentation():
            while not reason and (batch := list(islice(spans, AT_ONCE))):
                said.clear()
                try:
                    taken = transport.send(batch)
                except Exception as problem:  # noqa: BLE001 a library may raise anything
                    taken = False
                    said.append(f"{type(problem).__name__}: {problem}")
                if taken:
                    rejected = transport.rejected()
                    sent, refused = sent + len(batch) - rejected, refused + rejected
                else:
                    reason = (said[-1] if said else "no reason given").rstrip(".")
    except KeyboardInterrupt:
        reason = "ended while they were sent"
    transport.abort()
    if not reason and not refused:
        return ""
    why = reason or f"it rejects {refused}"
    return f"of the driver's own spans only {sent:,} went to {transport.name}: {why}"


def _spans(
    builder: ClientSpanBuilder, log: ClientLog, server_ends: Mapping[str, int]
) -> Iterator[ReadableSpan]:
    for chunk in log.chunks(rows=1_024):
        for values in zip(*chunk.values(), strict=True):
            row = dict(zip(chunk, values, strict=True))
            yield from builder.spans(row, server_ends.get(row["trace_id"]))


def _server_ends(folder: Path) -> dict[str, int]:
    """Return when the server was done with each request, by trace, where its clock is ours."""
    import pyarrow.parquet as pq

    here = boot_id()
    columns = ["trace_id", "start_ns", "duration_ns", "boot_id"]
    return {
        row["trace_id"]: row["start_ns"] + row["duration_ns"]
        for row in pq.read_table(folder / SERVER.file_name, columns=columns).to_pylist()
        if here and row["boot_id"] == here
    }
