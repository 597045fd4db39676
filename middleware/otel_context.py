"""The app's own OpenTelemetry spans hang under ours, without OpenTelemetry being imported here.

While a request runs, and while a stage is open, its span is the app's current one, as a span of
somebody else's (NonRecordingSpan): spans that the app starts become its children, and clients
that the app calls get it as their `traceparent`. The span itself is made later, from the record,
by an exporter; its id is derived on both sides (`stagescope.identity.stage_span_id`).

It costs nothing before the app has set a tracer provider.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from stagescope.identity import TraceParent, format_traceparent, stage_span_id
from stagescope.middleware.types import Scope

VARIABLE = "STAGESCOPE_APP_SPANS"
"""`0` leaves the app's spans where they were: for an app that exports spans while ours are not."""

Attached = tuple[Any, Any]
"""An OpenTelemetry context of ours, and the token to take it off again."""

_wanted = os.environ.get(VARIABLE, "") != "0"
_found: AppTracing | None = None


class AppTracing:
    """OpenTelemetry's functions, as the app has loaded them."""

    __slots__ = ("_trace", "attach", "context_of", "detach", "present", "provider")

    def __init__(self) -> None:
        trace: Any = sys.modules["opentelemetry.trace"]
        context: Any = sys.modules["opentelemetry.context"]
        self.attach = context.attach
        self.detach = context.detach
        self.present = context.get_current
        self.context_of = trace.set_span_in_context
        self.provider = trace.get_tracer_provider
        self._trace = trace

    def enter(self, trace_id: int, span_id: int, sampled: bool) -> Attached:
        """Make a span with these ids the current one."""
        trace = self._trace
        flags = trace.TraceFlags(int(sampled))
        span = trace.NonRecordingSpan(trace.SpanContext(trace_id, span_id, False, flags))
        context = self.context_of(span)
        return context, self.attach(context)

    def leave(self, attached: Attached) -> None:
        """Take it off, if it is on here: a generator may be closed in another context."""
        if self.present() is attached[0]:
            self.detach(attached[1])

    def samples(self, trace_id: int, name: str) -> bool:
        """Ask the app's sampler about a trace that begins with us, as if the app began it.

        A parent that is always sampled would overrule the share that the app has chosen.
        """
        sampler = getattr(self.provider(), "sampler", None)
        if sampler is None:
            return True
        return bool(sampler.should_sample(None, trace_id, name).decision.is_sampled())


def app_tracing(span_seen: bool) -> AppTracing | None:
    """Give the app's OpenTelemetry; None where it has none, or none that makes spans.

    *span_seen* says that a span is current, which is proof of one, whatever the provider.
    """
    global _found
    if _found is None and _wanted and (span_seen or _configured()):
        _found = AppTracing()
    return _found


def _configured() -> bool:
    trace: Any = sys.modules.get("opentelemetry.trace")
    # FastAPI loads OpenTelemetry whether the app uses it or not; asking for the provider costs
    # each request five times as much as a look at where it is kept, where it is kept there.
    if trace is None or getattr(trace, "_TRACER_PROVIDER", trace) is None:
        return False
    try:
        kind = type(trace.get_tracer_provider())
    except AttributeError:
        return False  # It is just being loaded by another thread.
    return kind.__name__ not in ("ProxyTracerProvider", "NoOpTracerProvider")


class Nesting:
    """Puts the spans of one request and of its stages around the app's."""

    __slots__ = ("_inside", "_sampled", "_span_id", "_start_ns", "_trace_id", "_tracing")

    def __init__(
        self,
        tracing: AppTracing,
        trace_id: bytes,
        span_id: bytes,
        start_ns: int,
        *,
        sampled: bool,
        inside: bool,
    ) -> None:
        self._tracing = tracing
        self._trace_id = int.from_bytes(trace_id, "big")
        self._span_id = int.from_bytes(span_id, "big")
        self._start_ns = start_ns
        self._sampled = sampled
        self._inside = inside

    def enter_request(self) -> Attached:
        """Make the request's span the current one."""
        return self._tracing.enter(self._trace_id, self._span_id, self._sampled)

    def enter_stage(self, at_ns: int) -> Attached:
        """Make the span of the stage that opened at *at_ns* the current one."""
        span_id = stage_span_id(self._span_id, at_ns - self._start_ns)
        return self._tracing.enter(self._trace_id, span_id, self._sampled)

    def leave(self, attached: Attached) -> None:
        """Undo an `enter`."""
        self._tracing.leave(attached)

    def told(self, scope: Scope) -> Scope:
        """Give *scope* with our span as its `traceparent`, where no span was around us.

        FastAPI's own telemetry, when it is inside us, goes by the header and not by the
        current span: without this it would begin a trace of its own.
        """
        if self._inside:
            return scope
        ours = format_traceparent(
            f"{self._trace_id:032x}", f"{self._span_id:016x}", sampled=self._sampled
        )
        headers = [pair for pair in scope["headers"] if pair[0] != b"traceparent"]
        return {**scope, "headers": [*headers, (b"traceparent", ours.encode())]}


def server_span_below(scope: Scope) -> bool:
    """Tell whether FastAPI's own telemetry, inside us, makes the request's SERVER span."""
    return getattr(scope.get("fastapi.telemetry"), "span", None) is not None


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
