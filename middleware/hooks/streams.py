"""Streamed bodies of Starlette and its like: what their generators do is the endpoint's work."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from stagescope.middleware.otel_context import Attached
from stagescope.middleware.recording.guard import fault, guarded
from stagescope.middleware.recording.names import CODES, intern
from stagescope.middleware.recording.timeline import NOWHERE, Timeline, current
from stagescope.middleware.sendings import Sendings
from stagescope.middleware.stage import marked
from stagescope.middleware.types import Message, Send

ENDPOINT = intern("endpoint")
"""A stage beside the six: the endpoint's own code, as far as it opens no stage itself."""

_PARSE = CODES["preprocess.parse"]

_TIMED = ("http.response.start", "http.response.body")


def streamed(stream: Callable[[Any, Send], Awaitable[None]]) -> Callable[..., Any]:
    """Make a wrapper of *stream*, a method that sends a response whose body is generated.

    Of several responses that hand one body on, as a middleware does, only the innermost is the
    endpoint's; it is the first that sends.
    """

    async def timed(response: Any, send: Send) -> None:
        timeline = current.get()
        if timeline is None or timeline.done or timeline.sendings is not None:
            await stream(response, send)
            return
        body = None
        with guarded(timeline.recorder):
            body = _Body(timeline, send)
        if body is None:
            await stream(response, send)
            return
        try:
            await stream(response, body.send)
        finally:
            with guarded(timeline.recorder):
                body.left()

    return marked(timed, ENDPOINT)


class _Body:
    """The making of one body: `endpoint`, until its last message is handed over, less `respond`.

    Times the sending here and not where the server is: between may lie a queue from one task to
    another, as of a `BaseHTTPMiddleware`, so that the generator goes on while a chunk is sent.
    """

    def __init__(self, timeline: Timeline, send: Send) -> None:
        self._timeline = timeline
        self._send = send
        self._index = NOWHERE
        self._attached: Attached | None = None
        self._sendings: Sendings | None = None
        with guarded(timeline.recorder):
            self._sendings = Sendings(timeline)
            since_ns = self._begin()
            if timeline.nesting is not None and since_ns:
                self._attached = timeline.nesting.enter_stage(since_ns)

    def _begin(self) -> int:
        """Open the stage; return since when it is open.

        A generator may have begun in a task or process of its own, and a stage of its has to count
        as opened later. So this one is the endpoint's, open again; if a generator is the endpoint,
        it began where the parameters were ready; else before the first stage that is open now.
        """
        timeline = self._timeline
        self._index, _ = timeline.last(ENDPOINT)
        if self._index != NOWHERE:
            return timeline.reopen(self._index)
        since_ns = timeline.last(_PARSE)[1] or timeline.before_open()
        self._index = timeline.open_at(ENDPOINT, since_ns)
        return since_ns

    async def send(self, message: Message) -> None:
        """Hand a message over."""
        sendings, send = self._sendings, self._send
        if sendings is None or message["type"] not in _TIMED:
            await send(message)
            return
        timeline = self._timeline
        try:
            now = timeline.clock()
            if message["type"] == "http.response.body" and not message.get("more_body"):
                timeline.close_at(self._index, now)
                self._index = NOWHERE
            sendings.begin(message, now)
        except Exception as problem:
            if fault(problem, timeline.recorder):
                raise
        try:
            await send(message)
        finally:
            with guarded(timeline.recorder):
                sendings.end(timeline.clock())

    def left(self) -> None:
        """Note that there is no more of it."""
        timeline = self._timeline
        if self._index != NOWHERE:
            timeline.close(self._index)
        if self._attached is not None and timeline.nesting is not None:
            timeline.nesting.leave(self._attached)
