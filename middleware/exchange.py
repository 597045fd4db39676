"""One HTTP exchange, seen from its `receive` and `send`: what is observed, and the record of it."""

from __future__ import annotations

from asyncio import get_running_loop
from collections.abc import Awaitable
from sys import modules

from stagescope.identity import parse_run, parse_traceparent
from stagescope.middleware.chunk_gaps import ChunkGaps
from stagescope.middleware.otel_context import Nesting, caller, server_span_below
from stagescope.middleware.recording.guard import fault, guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.slots import ENDS
from stagescope.middleware.recording.timeline import NOWHERE, Timeline
from stagescope.middleware.request_start import HEADERS as _STAMPS
from stagescope.middleware.request_start import waited_ns
from stagescope.middleware.route import MOUNT_KEY, template
from stagescope.middleware.runtime.loop_waits import end_step
from stagescope.middleware.sendings import Sendings
from stagescope.middleware.server_timing import answers, header_value
from stagescope.middleware.stage import mark
from stagescope.middleware.types import Message, Receive, Scope, Send
from stagescope.recorder import format as fmt

_INGRESS = CODES["queue.ingress"]
_READ = CODES["preprocess.read"]
_RESPOND = CODES["respond"]

_SAMPLED = fmt.FLAG_SAMPLED
_LOOKED_AT = _STAMPS | {b"traceparent", b"baggage"}

_QUERY = ord("?")
"""As a number: looking for bytes in bytes costs five times as much (CPython raises inside)."""

_METHODS = {m: m.encode() for m in ("GET", "POST", "PUT", "HEAD", "DELETE", "OPTIONS", "PATCH")}

_STATUSES = {status: status for status in range(1000)}
"""What else an app gives as status is the server's to refuse; we write 0 then."""

assert ENDS == 32  # A literal below; a name costs a look-up for each request.

_UNCHUNKED = ("http.response.pathsend", "http.response.zerocopysend")
"""Extensions by which the server itself reads the body from a file."""

ONE_SENDING_NS = 1_000_000
"""Head and whole body no further apart than this are one sending: what lies between is the server."""

ERROR_GRACE_S = 0.1
"""How long the record of a 5xx waits for the exception behind it."""


def begin(recorder: Recorder, scope: Scope) -> Timeline:
    """Start the timeline of a request from its scope.

    It starts now, or when a proxy in front of us says that the request reached it; the time
    between is `queue.ingress` (see request_start.py).
    """
    clock = recorder.clock
    now_ns = start_ns = clock()
    if now_ns >= recorder.upkeep_due_ns:
        recorder.upkeep(now_ns)
    parent = None
    run = b""
    named = False
    for name, value in scope["headers"]:
        if name in _LOOKED_AT:  # One test for each of the headers that say nothing to us.
            if name == b"traceparent":
                # As the specification asks: several are as good as none.
                parent = None if named else parse_traceparent(value)
                named = True
            elif name == b"baggage":
                run = run or parse_run(value)
            elif start_ns == now_ns:
                start_ns -= waited_ns(value, recorder.wall())
                if start_ns <= 0:
                    start_ns = now_ns  # From before this host was up: a forged one.
    inside, tracing = False, None
    if "opentelemetry.trace" in modules:
        parent, inside, tracing = caller(parent, scope, recorder.path, now_ns)
    bits = recorder.random_bits
    method = scope["method"]
    if parent is None:
        number = bits(128) or 1
        trace_id, parent_id = number.to_bytes(16, "big"), b""
        sampled = tracing is None or tracing.samples(number, scope)
    else:
        trace_id, parent_id, sampled = parent
    path = scope.get("raw_path") or scope["path"].encode("utf-8", "replace")
    if _QUERY in path:
        path = path[: path.index(_QUERY)]  # Some servers leave the query in; we never keep it.
    span_id = (bits(64) or 1).to_bytes(8, "big")
    flags, nesting = _SAMPLED if sampled else 0, None
    if inside:
        flags |= fmt.FLAG_INTERNAL
    if tracing is not None:
        flags |= fmt.FLAG_NESTED
        state = tracing.state(scope, inside) if parent else None
        nesting = Nesting(tracing, trace_id, span_id, start_ns, sampled, inside, state)
    timeline = Timeline(
        recorder, fmt.KIND_REQUEST, start_ns, trace_id, span_id,
        parent_id, run, _METHODS.get(method) or method.encode("utf-8", "replace"),
        path, flags,
    )  # fmt: skip
    timeline.nesting = nesting
    if start_ns != now_ns:
        with guarded(recorder):
            timeline.close_at(timeline.open_at(_INGRESS, start_ns), now_ns)
    return timeline


class Exchange:
    """Stands between server and app for one request; passes every message on unchanged."""

    __slots__ = (
        "_body_read", "_chunks", "_disconnected", "_first_byte_ns", "_gaps", "_receive",
        "_request_bytes", "_respond_index", "_response_bytes", "_scope", "_send", "_send_wait_ns",
        "_sendings", "_sent_ns", "_status", "_timeline", "ended_ns",
    )  # fmt: skip

    def __init__(self, timeline: Timeline, scope: Scope, receive: Receive, send: Send) -> None:
        self._timeline = timeline
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body_read = self._disconnected = False
        self._status = self._chunks = self._request_bytes = self._response_bytes = 0
        self._first_byte_ns = self._send_wait_ns = self._sent_ns = 0
        self._gaps: ChunkGaps | None = None
        self._respond_index = NOWHERE
        self._sendings: Sendings | None = None
        """Of a stream whose sendings no hook times nearer to the app (see hooks/streams.py)."""
        self.ended_ns = 0
        """When the last byte was handed over; 0 until then."""

    # The methods that call the server's `receive` and `send` guard all else that they do: by a
    # `try`, which costs nothing until something is raised.
    # What is called often stands in a local first: `timeline.clock()` would look for a method.
    # `open_at` and `close_at` are written out where every request comes by: a call of each costs
    # as much as what it writes. Where the entry has no place in the first slot, or the timeline
    # ended, the views raise, and the method that is called then knows what to do.

    @mark("preprocess.read")
    async def receive(self) -> Message:
        """Time the reading of the body; waiting for a disconnect after it is not timed."""
        receive = self._receive
        if self._body_read:
            message = await receive()
            if message["type"] == "http.disconnect":
                self._disconnected = True
            return message
        timeline = self._timeline
        clock = timeline.clock
        index = next(timeline.indices)
        try:
            timeline.codes[index] = _READ
            timeline.times[index] = clock()
        except (IndexError, ValueError):
            with guarded(timeline.recorder):
                timeline.spill(index, _READ, clock())
        try:
            message = await receive()
        finally:
            try:
                timeline.times[index + 32] = clock()
            except (IndexError, ValueError):
                with guarded(timeline.recorder):
                    timeline.close_at(index, clock())
        if message["type"] == "http.disconnect":
            self._disconnected = True
        else:
            if body := message.get("body"):
                self._request_bytes += len(body)
            if not message.get("more_body"):
                self._body_read = True
        return message

    def send(self, message: Message) -> Awaitable[None]:
        """Charge `respond` with the time in which the server takes the message, and no more."""
        kind = message["type"]
        if kind == "http.response.body":
            return self._send_body(message)
        if kind == "http.response.start":
            return self._send_start(message)
        if kind in _UNCHUNKED and not message.get("more_body"):
            return self._send_file(message)
        send = self._send
        return send(message)

    @mark("respond")
    async def _send_start(self, message: Message) -> None:
        timeline, send = self._timeline, self._send
        clock = timeline.clock
        index = NOWHERE
        try:
            self._status = message.get("status", 0)  # A missing one is the server's to refuse.
            now = clock()
            if timeline.run:  # A client names one; whether it is answered is looked up then only.
                message = self._with_server_timing(message, now)
            if timeline.sendings is None:
                index = self._respond_index = next(timeline.indices)
                try:
                    timeline.codes[index] = _RESPOND
                    timeline.times[index] = now
                except (IndexError, ValueError):
                    timeline.spill(index, _RESPOND, now)
            if timeline.nesting is not None and server_span_below(self._scope):
                timeline.flag(fmt.FLAG_INTERNAL)
        except Exception as problem:
            if fault(problem, timeline.recorder):
                raise
        try:
            await send(message)
        finally:
            if index != NOWHERE:
                self._sent_ns = after = clock()
                try:
                    timeline.times[index + 32] = after
                except (IndexError, ValueError):
                    with guarded(timeline.recorder):
                        timeline.close_at(index, after)

    @mark("respond")
    async def _send_body(self, message: Message) -> None:
        timeline, send = self._timeline, self._send
        clock = timeline.clock
        more, body = message.get("more_body"), message.get("body")
        before = clock()
        try:
            if more or timeline.sendings is not None or before - self._sent_ns >= ONE_SENDING_NS:
                self._open_sending(message, before)
            else:
                try:
                    timeline.times[self._respond_index + 32] = 0  # Open again.
                except (IndexError, ValueError):
                    timeline.close_at(self._respond_index, 0)
        except Exception as problem:
            if fault(problem, timeline.recorder):
                raise
        try:
            await send(message)
        except BaseException:
            with guarded(timeline.recorder):
                after = clock()
                self._close_sending(after)
                if not more and self._first_byte_ns and not body:
                    # Under hypercorn on trio the end of a stream cancels the sending of its end.
                    self.end(after)
            raise
        try:
            after = clock()
            self._chunks += 1
            self._send_wait_ns += after - before
            if body:
                self._response_bytes += len(body)
                if not self._first_byte_ns:
                    self._first_byte_ns = after - timeline.start_ns
                else:
                    self._further_chunk(after)
            if more:
                self._close_sending(after)
            else:
                self.ended_ns = after
                if self._status < 500:
                    self.finish("")  # As `end` does, without a call of it.
                else:
                    self.end(after)
        except Exception as problem:
            if fault(problem, timeline.recorder):
                raise

    def _open_sending(self, message: Message, at_ns: int) -> None:
        timeline = self._timeline
        if timeline.sendings is None:
            if message.get("more_body"):
                self._sendings = Sendings(timeline, self._respond_index, self._sent_ns)
            else:
                self._respond_index = timeline.open_at(_RESPOND, at_ns)
        if self._sendings is not None:
            self._sendings.begin(message, at_ns)

    def _close_sending(self, at_ns: int) -> None:
        if self._sendings is not None:
            self._sendings.end(at_ns)
        elif self._timeline.sendings is None:
            self._timeline.close_at(self._respond_index, at_ns)

    def _further_chunk(self, after: int) -> None:
        if self._gaps is None:
            self._gaps = ChunkGaps(self._timeline.start_ns + self._first_byte_ns)
        self._gaps.chunk(after)

    @mark("respond")
    async def _send_file(self, message: Message) -> None:
        timeline, send = self._timeline, self._send
        with guarded(timeline.recorder):
            self._respond_index = timeline.open(_RESPOND)
        try:
            await send(message)
        except BaseException:
            with guarded(timeline.recorder):
                timeline.close(self._respond_index)
            raise
        with guarded(timeline.recorder):
            self.end(timeline.clock())

    def _with_server_timing(self, message: Message, now_ns: int) -> Message:
        try:
            if not answers(self._timeline):
                return message
            timing = (b"server-timing", header_value(self._timeline, now_ns))
        except Exception as error:
            if fault(error, self._timeline.recorder):
                raise
            return message
        return {**message, "headers": [*message.get("headers", ()), timing]}

    def end(self, at_ns: int) -> None:
        """Note that the last byte was handed over at *at_ns*."""
        self.ended_ns = at_ns
        if self._status < 500:
            self.finish("")
            return
        # An error's class is known only when the app has raised it, after its 500 was sent. An
        # app that raises nothing may have a background task, which the record does not wait for.
        try:
            loop = get_running_loop()
        except RuntimeError:
            return  # trio: the record is written when the app returns.
        loop.call_later(ERROR_GRACE_S, self._finish_unless_done)

    def _finish_unless_done(self) -> None:
        with guarded(self._timeline.recorder):
            if not self._timeline.done:
                self.finish("")

    def failed(self, error: BaseException) -> str:
        """Return the class name of what the app raised; the server answers for it with a 500."""
        if not self._status and not self._disconnected and isinstance(error, Exception):
            self._status = 500
        return type(error).__name__

    def finish(self, error: str) -> None:
        """Write the record; *error* is the exception's class name, or empty."""
        try:
            timeline = self._timeline
            scope, end_ns = self._scope, self.ended_ns
            if end_ns:
                index = (
                    self._respond_index if timeline.sendings is None else timeline.sendings.index
                )
                try:
                    timeline.times[index + 32] = end_ns
                except (IndexError, ValueError):
                    timeline.close_at(index, end_ns)
            else:
                end_ns = timeline.clock()
                error = error or ("disconnect" if self._disconnected else "incomplete")
            if self._gaps is not None:
                self._gaps.write(timeline)
            if timeline.watched:
                end_step(timeline, end_ns)
            timeline.finish(
                end_ns, self._request_bytes, self._response_bytes, self._first_byte_ns,
                self._send_wait_ns, self._chunks, _STATUSES.get(self._status, 0),
                error.encode("utf-8", "replace") if error else b"",
                template(scope) if "route" in scope or MOUNT_KEY in scope else b"",
            )  # fmt: skip
        except Exception as problem:
            if not self._timeline.done:
                self._timeline.discard()
            if fault(problem, self._timeline.recorder):
                raise
