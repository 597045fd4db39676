"""When the server was given the messages of a streamed response, and took them: `respond`."""

from __future__ import annotations

from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import NOWHERE, Timeline
from stagescope.middleware.types import Message

_FIRST_BYTE = CODES["respond.first_byte"]
_STREAM = CODES["respond.stream"]

TIMED_APART = 16
"""Chunks of one response whose sending has an entry each; of later ones only that of slow sendings."""

SLOW_NS = 1_000_000
"""A client that keeps the server waiting longer than this for one chunk is slow; twice as long
after each 128 of them, so that a long stream leaves room for the app's stages."""

JOINED_NS = 50_000
"""Two messages that follow each other so closely are one sending: nothing is done between them."""


class Sendings:
    """The entries of one stream's sendings; no time between two of them is in one."""

    __slots__ = ("_begun_ns", "_chunks", "_ended_ns", "_replaceable", "_slow", "_timeline", "index")

    def __init__(self, timeline: Timeline, index: int = NOWHERE, ended_ns: int = 0) -> None:
        """*index* is the entry of the head's sending, which ended at *ended_ns*."""
        self._timeline = timeline
        self._begun_ns = 0
        self._ended_ns = ended_ns
        self._chunks = self._slow = 0
        self._replaceable = False
        self.index = index
        """The entry of the last sending."""
        timeline.sendings = self
        timeline.recode(index, _FIRST_BYTE)

    def begin(self, message: Message, at_ns: int) -> None:
        """Note that the server is given *message* at *at_ns*, an end or a body."""
        timeline, chunks = self._timeline, self._chunks
        self._begun_ns = at_ns
        if message["type"] != "http.response.start":
            self._chunks += 1
        empty_end = not message.get("more_body") and not message.get("body")
        if (empty_end or not chunks) and at_ns - self._ended_ns < JOINED_NS:
            timeline.reopen(self.index)
        elif self._replaceable:
            timeline.reopen(self.index, at_ns)
        else:
            self.index = timeline.open_at(_STREAM if chunks else _FIRST_BYTE, at_ns)

    def end(self, at_ns: int) -> None:
        """Note that it took it until *at_ns*."""
        self._ended_ns = at_ns
        self._timeline.close_at(self.index, at_ns)
        if at_ns - self._begun_ns > SLOW_NS << (self._slow >> 7):
            self._slow += 1
            self._replaceable = False
        else:
            self._replaceable = self._chunks > TIMED_APART
