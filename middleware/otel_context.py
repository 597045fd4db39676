"""The app's own OpenTelemetry spans hang under ours, without OpenTelemetry being imported here.

While a request runs, and while a stage is open, its span is the app's current one, as a span of
somebody else's (NonRecordingSpan): spans that the app starts become its children, and clients
that the app calls get it as their `traceparent`. The span itself is made later, from the record,
by an exporter; its id is derived on both sides (`stagescope.identity.stage_span_id`).

It happens only while our spans reach the back end that the app's own spans go to: else they would
name parents that no back end has. The agent says in the spool where it exports to
(`exporting`, see `recorder.spool`), which is looked at once a second.

It costs nothing before the app has set a tracer provider.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stagescope import settings
from stagescope.identity import TraceParent, stage_span_id
from stagescope.middleware.recording.guard import say_once
from stagescope.middleware.types import Scope
from stagescope.recorder.spool import EXPORTING_NAME

LOOK_NS = 1_000_000_000
"""How often it is looked whether our spans are exported."""
STALE_S = 15.0
"""An agent touches its file much more often; one that has not is gone or stuck."""
PATIENCE_NS = 30_000_000_000
"""How long nesting may be impossible before it is logged: a first export takes a while."""

OURS = "is_stagescopes"
"""An attribute of the spans that stand for ours in OpenTelemetry's context."""

_LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0")

Attached = tuple[Any, Any]
"""An OpenTelemetry context of ours, and the token to take it off again."""

_asked = settings.APP_SPANS.choice()
_wanted = _asked != "0"
_found: AppTracing | None = None


class AppTracing:
    """OpenTelemetry's functions, as the app has loaded them."""

    __slots__ = (
        "_due_ns", "_known", "_nests", "_others", "_since_ns", "_span", "_trace", "_w3c",
        "attach", "context_of", "detach", "present", "provider",
    )  # fmt: skip

    def __init__(self) -> None:
        trace: Any = sys.modules["opentelemetry.trace"]
        context: Any = sys.modules["opentelemetry.context"]
        self.attach = context.attach
        self.detach = context.detach
        self.present = context.get_current
        self.context_of = trace.set_span_in_context
        self.provider = trace.get_tracer_provider
        self._trace = trace
        self._span = type("StageSpan", (trace.NonRecordingSpan,), {OURS: True})
        self._due_ns = self._since_ns = 0
        self._nests = _asked == "1"
        self._known: Any = None
        self._w3c = self._others = False

    def nests(self, ring: Path | None, now_ns: int) -> bool:
        """Return whether the app's spans may go under ours now; cheap, but for once a second."""
        if now_ns >= self._due_ns and _asked != "1":
            self._due_ns = now_ns + LOOK_NS
            self._since_ns = self._since_ns or now_ns
            problem = self._problem(ring)
            self._nests = not problem
            if problem and now_ns - self._since_ns > PATIENCE_NS:
                say_once(
                    f"the app's OpenTelemetry spans are not put under stagescope's, because "
                    f"{problem}; to join them, let stagescope export to where the app does "
                    f"(OTEL_EXPORTER_OTLP_ENDPOINT, or --otlp), or set {settings.APP_SPANS.name}=1 where both "
                    f"reach one back end by different ways; {settings.APP_SPANS.name}=0 says no to it"
                )
        return self._nests

    def _problem(self, ring: Path | None) -> str:
        """Return why the app's spans could not meet ours; empty where they can."""
        ours = exporting_to(ring.parent) if ring else ""
        if not ours:
            return "stagescope's own are not exported, or their export fails"
        theirs = exporter_hosts(self.provider())
        if not theirs:
            return "where the app exports its own to cannot be found out"
        if ours not in theirs:
            return f"those go to {ours} and the app's to {', '.join(sorted(theirs))}"
        return ""

    def asks_propagator(self, has_parent: bool) -> bool:
        """Return whether a caller's span is to be read by the app's propagator, not by us.

        *has_parent* says that there is a valid `traceparent`.
        """
        propagator = self._propagator()
        if propagator is not self._known:  # Its `fields` are put together at each look.
            self._known = propagator
            self._w3c = "traceparent" in propagator.fields
            self._others = bool(propagator.fields - {"traceparent", "tracestate", "baggage"})
        return self._others and not (has_parent and self._w3c)

    def extracted(self, headers: Iterable[tuple[bytes, bytes]]) -> TraceParent | None:
        """Return the caller's span as the app's own propagator reads it; None where there is none."""
        try:
            found = self._propagator().extract(_carrier(headers), context={})
            return _identity(self._trace.get_current_span(found).get_span_context())
        except Exception as error:  # noqa: BLE001 - not our code, which may raise anything
            say_once(f"the app's propagator raised {type(error).__name__}; the caller is not known")
            return None

    def state(self, scope: Scope, inside: bool) -> Any:
        """Return the caller's `tracestate`, which goes on with the trace."""
        if inside:
            return self._trace.get_current_span().get_span_context().trace_state
        found = self._propagator().extract(_carrier(scope["headers"]), context={})
        return self._trace.get_current_span(found).get_span_context().trace_state

    def inject(self, context: Any) -> tuple[dict[str, str], set[str]]:
        """Return headers that carry *context*, and the names that the app's propagator reads."""
        propagator = self._propagator()
        carrier: dict[str, str] = {}
        propagator.inject(carrier, context=context)
        return carrier, set(propagator.fields)

    def _propagator(self) -> Any:
        propagate: Any = sys.modules.get("opentelemetry.propagate")
        if propagate is None:  # A part of the API that the app has loaded, so it is there.
            propagate = import_module("opentelemetry.propagate")
        return propagate.get_global_textmap()

    def context(self, trace_id: int, span_id: int, sampled: bool, state: Any) -> Any:
        """Return the present context with a span with these ids as the current one."""
        trace = self._trace
        flags = trace.TraceFlags(int(sampled))
        span = trace.SpanContext(trace_id, span_id, False, flags, state)
        return self.context_of(self._span(span))

    def enter(self, trace_id: int, span_id: int, sampled: bool, state: Any) -> Attached:
        """Make a span with these ids the current one."""
        context = self.context(trace_id, span_id, sampled, state)
        return context, self.attach(context)

    def leave(self, attached: Attached) -> None:
        """Take it off, if it is on here: a generator may be closed in another context."""
        if self.present() is attached[0]:
            self.detach(attached[1])

    def samples(self, trace_id: int, scope: Scope) -> bool:
        """Ask the app's sampler about a trace that begins with us, as its instrumentation would.

        A parent that is always sampled would overrule the share that the app has chosen. A sampler
        that raises is the app's fault and would stop its own spans alone: ours are recorded.
        """
        sampler = getattr(self.provider(), "sampler", None)
        if sampler is None:
            return True
        method, path = scope["method"], scope["path"]
        scheme = scope.get("scheme", "http")
        try:
            result = sampler.should_sample(
                None, trace_id, f"{method} {path}",
                kind=self._trace.SpanKind.SERVER,
                attributes={
                    "http.request.method": method, "url.path": path, "url.scheme": scheme,
                    "http.method": method, "http.target": path, "http.scheme": scheme,
                },
                links=(),
            )  # fmt: skip
            return bool(result.decision.is_sampled())
        except Exception as error:  # noqa: BLE001 - the app's code, which may raise anything
            say_once(f"the app's sampler raised {type(error).__name__}; its answer counts as yes")
            return True


def exporting_to(spool: Path) -> str:
    """Return the host that the agent of *spool* exports spans to; empty while it does not."""
    file = spool / EXPORTING_NAME
    try:
        if time.time() - file.stat().st_mtime > STALE_S:
            return ""
        return host_of(file.read_text("utf-8"))
    except (OSError, ValueError):
        return ""


def exporter_hosts(provider: Any) -> set[str]:
    """Return the hosts that the span exporters of *provider* send to, as far as they tell."""
    several = getattr(provider, "_active_span_processor", None)
    endpoints = []
    for processor in getattr(several, "_span_processors", ()):
        inner = getattr(processor, "_batch_processor", processor)
        exporter = getattr(processor, "span_exporter", None) or getattr(inner, "_exporter", None)
        endpoints.append(getattr(exporter, "_endpoint", None))
    return {host_of(text) for text in endpoints if isinstance(text, str)} - {""}


def host_of(endpoint: str) -> str:
    """Return the host of an endpoint, with or without a scheme; every name of this one is one."""
    endpoint = endpoint.split(" ")[0].strip()
    host = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}").hostname or ""
    return "localhost" if host in _LOCAL else host


def _carrier(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}


def _identity(context: Any) -> TraceParent | None:
    if not context.is_valid:
        return None
    return (
        context.trace_id.to_bytes(16, "big"),
        context.span_id.to_bytes(8, "big"),
        bool(context.trace_flags & 1),
    )


def caller(
    parent: TraceParent | None, scope: Scope, ring: Path | None, now_ns: int
) -> tuple[TraceParent | None, bool, AppTracing | None]:
    """Return a request's caller, whether that is a span of this process, and where to nest spans.

    *parent* is what the request's `traceparent` says.
    """
    try:
        # FastAPI loads OpenTelemetry whether the app uses it or not: the usual case first. Asking
        # for the provider costs five times as much as a look at where it is kept.
        trace: Any = sys.modules["opentelemetry.trace"]
        context: Any = sys.modules["opentelemetry.context"]
        if _found is None and trace._TRACER_PROVIDER is None and not context.get_current():
            return parent, False, None
    except (AttributeError, KeyError):
        pass  # Kept elsewhere, or it is being loaded by another thread.
    outer = outer_span(parent)
    tracing = app_tracing(outer is not None)
    if tracing is not None:
        if outer is None and tracing.asks_propagator(parent is not None):
            parent = tracing.extracted(scope["headers"])
        if not tracing.nests(ring, now_ns):
            tracing = None
    return outer or parent, outer is not None, tracing


def app_tracing(span_seen: bool) -> AppTracing | None:
    """Return the app's OpenTelemetry; None where it has none, or none that makes spans.

    *span_seen* says that a span is current, which is proof of one, whatever the provider.
    """
    global _found
    if _found is None and _wanted and (span_seen or _configured()):
        _found = AppTracing()
    return _found


def _configured() -> bool:
    trace: Any = sys.modules["opentelemetry.trace"]
    if getattr(trace, "_TRACER_PROVIDER", trace) is None:
        return False  # To ask for one would make one.
    try:
        kind = type(trace.get_tracer_provider())
    except AttributeError:
        return False  # It is just being loaded by another thread.
    return kind.__name__ not in ("ProxyTracerProvider", "NoOpTracerProvider")


class Nesting:
    """Puts the spans of one request and of its stages around the app's."""

    __slots__ = ("_inside", "_sampled", "_span_id", "_start_ns", "_state", "_trace_id", "_tracing")

    def __init__(
        self,
        tracing: AppTracing,
        trace_id: bytes,
        span_id: bytes,
        start_ns: int,
        sampled: bool,
        inside: bool,
        state: Any = None,
    ) -> None:
        self._tracing = tracing
        self._trace_id = int.from_bytes(trace_id, "big")
        self._span_id = int.from_bytes(span_id, "big")
        self._start_ns = start_ns
        self._sampled = sampled
        self._inside = inside
        self._state = state

    def enter_request(self) -> Attached:
        """Make the request's span the current one."""
        return self._tracing.enter(self._trace_id, self._span_id, self._sampled, self._state)

    def enter_stage(self, at_ns: int) -> Attached:
        """Make the span of the stage that opened at *at_ns* the current one."""
        span_id = stage_span_id(self._span_id, at_ns - self._start_ns)
        return self._tracing.enter(self._trace_id, span_id, self._sampled, self._state)

    def leave(self, attached: Attached) -> None:
        """Undo an `enter`."""
        self._tracing.leave(attached)

    def told(self, scope: Scope) -> Scope:
        """Return *scope* with our span in the headers that the app's propagator reads.

        Where a span was around us, *scope* as it is. FastAPI's own telemetry, when it is inside us,
        goes by the header and not by the current span: without this it would begin a trace.
        """
        if self._inside:
            return scope
        tracing = self._tracing
        ours = tracing.context(self._trace_id, self._span_id, self._sampled, self._state)
        carrier, read = tracing.inject(ours)
        replaced = {name.encode() for name in (read | carrier.keys()) - {"baggage"}}
        headers = [pair for pair in scope["headers"] if pair[0] not in replaced]
        told = [(name.lower().encode(), value.encode()) for name, value in carrier.items()]
        return {**scope, "headers": [*headers, *told]}


def server_span_below(scope: Scope) -> bool:
    """Return whether FastAPI's own telemetry, inside us, makes the request's SERVER span."""
    return getattr(scope.get("fastapi.telemetry"), "span", None) is not None


def outer_span(named: TraceParent | None) -> TraceParent | None:
    """Return the identity of the span around a request; None where the app has none.

    *named* is what the request's own header names. asyncio may begin a request in the context of
    an earlier one of its connection: a span of ours, one that has ended, and one below such a
    span, whose trace is not the named one, are what that one left behind, and around nothing.
    """
    try:
        if not sys.modules["opentelemetry.context"].get_current():
            return None  # The usual case, in a third of the time.
        span: Any = sys.modules["opentelemetry.trace"].get_current_span()
        found = _identity(span.get_span_context())
    except (AttributeError, KeyError):
        return None  # It is being imported at this moment, by another thread.
    if hasattr(span, OURS) or getattr(span, "end_time", None) is not None:
        return None
    if found and named and found[0] != named[0] and getattr(span, "parent", None) is not None:
        return None
    return found
