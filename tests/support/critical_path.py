"""The critical path of a trace as Jaeger's page computes it (jaeger-ui 1.76, CriticalPath/).

With its limits: a span's parent is its first reference; a child outside its parent is cut or
dropped; ends are compared with starts by `<`, on whole microseconds.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Self

from opentelemetry.sdk.trace import ReadableSpan


@dataclass
class PathSpan:
    """What of a span the path depends on; times are whole microseconds."""

    name: str
    span_id: str
    parent: str
    """Its first reference; empty for a root."""
    start: int
    end: int
    children: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, span: ReadableSpan) -> Self:
        """Read one as Jaeger does: start and duration lose what is less than a microsecond."""
        assert span.context is not None
        start, end = span.start_time or 0, span.end_time or 0
        first = span.parent or next((link.context for link in span.links), None)
        begins = start // 1000
        return cls(
            span.name, f"{span.context.span_id:016x}", f"{first.span_id:016x}" if first else "",
            begins, begins + (end - start) // 1000,
        )  # fmt: skip


def critical_path(given: Iterable[PathSpan]) -> list[str]:
    """Return the names of the spans on the path, from its end; empty where there is no root."""
    spans = {span.span_id: replace(span, children=[]) for span in given}
    roots = [span for span in spans.values() if not span.parent]
    for span in sorted(spans.values(), key=lambda span: -span.end):
        if parent := spans.get(span.parent):
            parent.children.append(span.span_id)
    for root in roots:
        _sanitize(spans, root)
    return [name for root in roots for name in _walk(spans, root)]


def _sanitize(spans: dict[str, PathSpan], parent: PathSpan) -> None:
    for child_id in list(parent.children):
        child = spans[child_id]
        if child.start >= parent.end or child.end <= parent.start:
            parent.children.remove(child_id)
        else:
            child.start, child.end = max(child.start, parent.start), min(child.end, parent.end)
            _sanitize(spans, child)


def _walk(spans: dict[str, PathSpan], root: PathSpan) -> Iterable[str]:
    span, before = root, 0
    while True:
        last = next((spans[c] for c in span.children if not before or spans[c].end < before), None)
        until = before or span.end
        if last:
            if last.end != until:
                yield span.name
            span, before = last, 0
            continue
        if span.start != until:
            yield span.name
        if not span.parent:
            return
        span, before = spans[span.parent], span.start
