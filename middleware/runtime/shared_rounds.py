"""A round of a worker that several requests waited for is a batch: it has a record of its own.

Nobody says who is in it: each request that the worker wakes is one more. So the record is written
when the worker begins its next round, or a moment after the second member was woken; a first
member that was through by then does not name the batch.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Protocol

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline
from stagescope.recorder import format as fmt

LATER_S = 0.05
"""A worker has woken all members so long after the second one."""
MOST_MEMBERS = 1024

_WAIT = CODES["batch.wait"]
_open: set[Members] = set()
"""Batches whose record is not written yet."""


class Block(Protocol):
    """What a worker did, see `workers.Block`."""

    code: int
    start_ns: int
    end_ns: int


class Members:
    """The requests that one round of a worker was for."""

    __slots__ = ("_blocks", "_free_ns", "_requests", "_since_ns", "_span_id", "_written")

    def __init__(self, blocks: Sequence[Block], free_ns: int) -> None:
        self._blocks = blocks
        self._free_ns = free_ns
        self._requests: dict[int, Timeline] = {}
        self._since_ns = 0
        self._span_id = 0
        """0 while there is one member."""
        self._written = False

    def add(self, request: Timeline, since_ns: int = 0) -> None:
        """Take in *request*, which waited from *since_ns* on (0: not known); two are a batch."""
        if since_ns:
            self._since_ns = min(self._since_ns or since_ns, since_ns)
        if self._written or id(request) in self._requests or len(self._requests) >= MOST_MEMBERS:
            return
        self._requests[id(request)] = request
        if len(self._requests) < 2:
            return
        at_ns = time.monotonic_ns()
        if not self._span_id:
            self._span_id = request.recorder.random_bits(64) or 1
            next(iter(self._requests.values())).mark(fmt.CODE_BATCH, self._span_id, at_ns)
            _open.add(self)
            loop = asyncio._get_running_loop()
            if loop is not None:
                loop.call_later(LATER_S, self.write)
        request.mark(fmt.CODE_BATCH, self._span_id, at_ns)

    def write(self) -> None:
        """Write the batch's record; a second call does nothing."""
        _open.discard(self)
        if self._span_id and not self._written:
            self._written = True
            with guarded():
                self._write()
        self._requests = {}

    def _write(self) -> None:
        members = list(self._requests.values())
        last = members[-1]
        blocks = sorted(self._blocks, key=lambda block: block.start_ns)
        first_ns = blocks[0].start_ns
        start_ns = min(max(self._free_ns, self._since_ns) or first_ns, first_ns)
        end_ns = max(block.end_ns or time.monotonic_ns() for block in blocks)
        made = Timeline(
            last.recorder,
            fmt.KIND_BATCH,
            start_ns,
            (last.recorder.random_bits(128) or 1).to_bytes(16, "big"),
            self._span_id.to_bytes(8, "big"),
            run=last.run,
        )
        try:
            if start_ns < first_ns:
                made.mark(_WAIT, start_ns, first_ns)
            for block in blocks:
                made.mark(block.code, block.start_ns, block.end_ns or end_ns)
            for request in members:
                span, trace = request.span_id, request.trace_id
                low, high = int.from_bytes(trace[8:], "big"), int.from_bytes(trace[:8], "big")
                made.mark(fmt.CODE_MEMBER, int.from_bytes(span, "big"), low)
                made.mark(fmt.CODE_MEMBER_TRACE, high, 0)
            made.finish(end_ns, 0, 0, 0, 0, len(members), 0, b"", b"")
        finally:
            if not made.done:
                made.discard()


def write_all() -> None:
    """Write the records of the batches that are left."""
    for members in list(_open):
        members.write()
