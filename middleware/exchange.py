"""One HTTP exchange, seen from its `receive` and `send`: what is observed, and the record of it."""

from __future__ import annotations

from stagescope import recorder_format as fmt
from stagescope.identity import TraceParent, parse_run, parse_traceparent
from stagescope.middleware.names import CODES
from stagescope.middleware.outer_span import outer_span
from stagescope.middleware.recorder import Recorder
from stagescope.middleware.server_timing import header_value
from stagescope.middleware.timeline import Timeline
from stagescope.middleware.types import Message, Receive, Scope, Send

_READ = CODES["preprocess.read"]
_RESPOND = CODES["respond"]
_FIRST_BYTE = CODES["respond.first_byte"]
_STREAM = CODES["respond.stream"]

SLOW_SEND_NS = 1_000_000
"""A client that keeps the server waiting longer than this for one chunk gets an entry of its own."""


def begin(recorder: Recorder, scope: Scope) -> Timeline:
    """Start the timeline of a request from its scope."""
    start_ns = recorder.clock()
    if start_ns >= recorder.anchor_due_ns:
        recorder.anchor(start_ns)
    parent: TraceParent | None = None
    run = b""
    traceparents = 0
    for name, value in scope["headers"]:
        if name == b"traceparent":
            traceparents += 1
            parent = parse_traceparent(value)
        elif name == b"baggage" and not run:
            run = parse_run(value)
    if traceparents > 1:
        parent = None  # As the specification asks: several are as good as none.
    flags = fmt.FLAG_SAMPLED
    outer = outer_span()
    if outer is not None:
        parent = outer
        flags |= fmt.FLAG_INTERNAL
    bits = recorder.random_bits
    if parent is None:
        trace_id, parent_id = (bits(128) or 1).to_bytes(16, "big"), b""
    else:
        trace_id, parent_id, sampled = parent
        if not sampled:
            flags &= ~fmt.FLAG_SAMPLED
    return Timeline(
        recorder, fmt.KIND_REQUEST, start_ns, trace_id, (bits(64) or 1).to_bytes(8, "big"),
        parent_id, run, scope["method"].encode("latin-1", "replace"),
        scope.get("raw_path") or scope["path"].encode("utf-8", "replace"), flags,
    )  # fmt: skip


class Exchange:
    """Stands between server and app for one request; passes every message on unchanged."""

    __slots__ = (
        "_body_read", "_chunks", "_disconnected", "_first_byte_ns", "_receive",
        "_request_bytes", "_respond_word", "_response_bytes", "_scope", "_send", "_send_wait_ns",
        "_status", "_timeline", "ended_ns",
    )  # fmt: skip

    def __init__(self, timeline: Timeline, scope: Scope, receive: Receive, send: Send) -> None:
        self._timeline = timeline
        self._scope = scope
        self._receive = receive
        self._send = send
        self._body_read = False
        self._disconnected = False
        self._status = 0
        self._chunks = 0
        self._request_bytes = 0
        self._response_bytes = 0
        self._first_byte_ns = 0
        self._send_wait_ns = 0
        self._respond_word = -1
        self.ended_ns = 0
        """When the last byte was handed over; 0 until then."""

    async def receive(self) -> Message:
        """Time the reading of the body; waiting for a disconnect after it is not timed."""
        if self._body_read:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                self._disconnected = True
            return message
        timeline = self._timeline
        word = timeline.open(_READ)
        try:
            message = await self._receive()
        finally:
            timeline.close(word)
        if message["type"] == "http.disconnect":
            self._disconnected = True
        else:
            self._request_bytes += len(message.get("body", b""))
            self._body_read = not message.get("more_body", False)
        return message

    async def send(self, message: Message) -> None:
        """Time the response from its start to its last byte."""
        kind = message["type"]
        if kind == "http.response.body":
            await self._send_body(message)
        elif kind == "http.response.start":
            timeline = self._timeline
            self._status = message["status"]
            now = timeline.clock()
            if timeline.run:
                timing = (b"server-timing", header_value(timeline, now))
                message = {**message, "headers": [*message.get("headers", ()), timing]}
            self._respond_word = timeline.open_at(_RESPOND, now)
            await self._send(message)
        else:
            await self._send(message)
            if kind == "http.response.pathsend":
                self._end()

    async def _send_body(self, message: Message) -> None:
        timeline = self._timeline
        size = len(message.get("body", b""))
        more = message.get("more_body", False)
        if more and not self._chunks:
            timeline.recode(self._respond_word, _FIRST_BYTE)
        before = timeline.clock()
        await self._send(message)
        after = timeline.clock()
        self._send_wait_ns += after - before
        self._response_bytes += size
        self._chunks += 1
        if size and not self._first_byte_ns:
            self._first_byte_ns = after - timeline.start_ns
        if not more:
            self._end(after)
        elif self._chunks == 1:
            timeline.close_at(self._respond_word, after)
            self._respond_word = timeline.open_at(_STREAM, after)
        elif after - before > SLOW_SEND_NS:
            # The stage that makes the chunks may be open around its sending; waiting for a
            # slow client is not its time. Written with hindsight, so only when it mattered.
            timeline.close_at(timeline.open_at(_STREAM, before), after)

    def _end(self, at_ns: int = 0) -> None:
        self.ended_ns = at_ns or self._timeline.clock()
        # An error's class is known only when the app has raised it, after its 500 was sent.
        if self._status < 500:
            self.finish("")

    def finish(self, error: str) -> None:
        """Write the record; *error* is the exception's class name, or empty."""
        timeline = self._timeline
        if timeline.done:
            return
        if not self.ended_ns and not error:
            error = "disconnect" if self._disconnected else "incomplete"
        end_ns = self.ended_ns or timeline.clock()
        if self._respond_word >= 0:
            timeline.close_at(self._respond_word, end_ns)
        route = getattr(self._scope.get("route"), "path", "")
        timeline.finish(
            end_ns, self._request_bytes, self._response_bytes, self._first_byte_ns,
            self._send_wait_ns, chunks=self._chunks, status=self._status, error=error.encode(),
            route=route.encode() if route else b"",
        )  # fmt: skip
