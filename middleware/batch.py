"""`batch(...)`: how a batcher says who waits, who is in, and where the batch is.

    ticket = batch.enqueue()              # in the request: it starts to wait
    with batch(model="resnet") as b:      # in the batcher, any task or thread: the worker is free
        b.add(ticket)                     # a member; the first one starts the forming
        with b.collate(): ...             # padding and stacking
        with b.inference(): ...           # in the model
    # left: done, or failed where by an exception

A member is charged `queue.batch` until the batch starts to form, `batch.wait` until it closes,
`batch.collate`, and `inference`, each as long as it waited for it, through the threads and tasks
of others. The batch itself is a record of its own, with links to its members and back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Self

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.middleware.runtime.thread_clock import Stretch, runs_a_loop
from stagescope.recorder import format as fmt

_QUEUE = CODES["queue.batch"]
_WAIT = CODES["batch.wait"]
_COLLATE = CODES["batch.collate"]
_INFERENCE = CODES["inference"]


class Ticket:
    """A request's place in a batcher's queue; made by `batch.enqueue`, in any process's thread."""

    __slots__ = ("index", "since_ns", "timeline")

    def __init__(self, timeline: Timeline, since_ns: int) -> None:
        self.timeline = timeline
        self.since_ns = since_ns
        self.index = timeline.open_at(_QUEUE, since_ns)

    def move(self, code: int, at_ns: int) -> None:
        """End the open stage at *at_ns* and open another."""
        self.timeline.close_at(self.index, at_ns)
        self.index = self.timeline.open_at(code, at_ns)

    def leave(self, at_ns: int, *, failed: bool = False) -> None:
        """End the open stage at *at_ns*."""
        self.timeline.close_at(self.index, at_ns, failed=failed)


class _Phase:
    """Lets a phase stand in a `with`; it ends at its block's end where *ends* is true."""

    __slots__ = ("_batch", "_ends")

    def __init__(self, owner: batch, *, ends: bool) -> None:
        self._batch = owner
        self._ends = ends

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        with guarded():
            if kind is not None:
                self._batch.fail(kind)
            elif self._ends:
                self._batch.done()


class batch:
    """One batch of a batcher; use it from one thread or task at a time.

    *model* names the model in records, at most 128 bytes of UTF-8.
    Tickets of requests that ended meanwhile are members like others; nothing is written to
    them. A batch without a recorded member leaves no record.
    Nothing that can go wrong with it reaches the caller.
    """

    __slots__ = ("_at_work", "_begun_ns", "_code", "_index", "_model", "_size", "_timeline", "_word",
                 "device_ns", "tickets")  # fmt: skip

    def __init__(self, model: str = "", *, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self._model = model
        self._code = _WAIT
        self._timeline: Timeline | None = None
        self._index = 0
        self._size = 0
        self.tickets: list[Ticket] = []
        self.device_ns = 0
        """Device time of the whole batch, where somebody measured it."""
        self._at_work: tuple[Stretch, list[Timeline]] | None = None
        """What the batcher's thread does for those members of the present phase that are of an open
        load run."""
        self._begun_ns = clock()

    @staticmethod
    def enqueue() -> Ticket | None:
        """Say that the present request starts to wait for a batcher; None outside a request."""
        timeline = current.get()
        if timeline is None or timeline.done:
            return None
        with guarded(timeline.recorder):
            return Ticket(timeline, timeline.clock())
        return None

    def add(self, *tickets: Ticket | None) -> None:
        """Take members in; the first one of all starts the forming.

        A member that joins later, also while the model runs (continuous batching), is charged
        the present phase from then on. None, the ticket of no request, is passed over.
        """
        for ticket in tickets:
            if ticket is not None:
                with guarded(ticket.timeline.recorder):
                    self._add(ticket)

    def _add(self, ticket: Ticket) -> None:
        clock = ticket.timeline.clock
        if self._timeline is None:
            self._begin(ticket)
            joined = self._timeline_start
        else:
            joined = self._timeline_start if self._code == _WAIT else clock()
        if ticket.since_ns < joined:
            ticket.move(self._code, joined)
        else:
            ticket.timeline.recode(ticket.index, self._code)
        timeline = self._timeline
        assert timeline is not None
        member = ticket.timeline
        member.mark(fmt.CODE_BATCH, int.from_bytes(timeline.span_id, "big"), joined)
        span, low = (
            int.from_bytes(member.span_id, "big"),
            int.from_bytes(member.trace_id[8:], "big"),
        )
        timeline.mark(fmt.CODE_MEMBER, span, low)
        timeline.mark(fmt.CODE_MEMBER_TRACE, int.from_bytes(member.trace_id[:8], "big"), 0)
        self.tickets.append(ticket)
        self._size += 1

    @property
    def timeline(self) -> Timeline | None:
        """Its own timeline, with the ids of its span; None before it has a member."""
        return self._timeline

    @property
    def _timeline_start(self) -> int:
        assert self._timeline is not None
        return self._timeline.start_ns

    def _begin(self, first: Ticket) -> None:
        member = first.timeline
        bits = member.recorder.random_bits
        self._timeline = Timeline(
            member.recorder,
            fmt.KIND_BATCH,
            max(self._begun_ns, first.since_ns),
            (bits(128) or 1).to_bytes(16, "big"),
            (bits(64) or 1).to_bytes(8, "big"),
            run=member.run,
            path=self._model.encode("utf-8", "replace"),
        )
        self._index = self._timeline.open_at(_WAIT, self._timeline_start)

    def collate(self) -> _Phase:
        """Say that the members are complete and are being put together."""
        with guarded():
            self._phase(_COLLATE)
        return _Phase(self, ends=False)

    def inference(self) -> _Phase:
        """Say that the batch goes to the model; it has come back when the block is left."""
        with guarded():
            self._phase(_INFERENCE)
        return _Phase(self, ends=True)

    def _phase(self, code: int) -> None:
        self._code = code
        timeline = self._timeline
        if timeline is None or timeline.done:
            return
        with guarded(timeline.recorder):
            at = timeline.clock()
            self._end_stretch(at)
            timeline.close_at(self._index, at)
            self._index = timeline.open_at(code, at)
            for ticket in self.tickets:
                ticket.move(code, at)
            watched = [ticket.timeline for ticket in self.tickets if ticket.timeline.watched]
            if watched and not runs_a_loop():
                self._at_work = Stretch(at), watched

    def _end_stretch(self, at_ns: int) -> None:
        if self._at_work is not None:
            (stretch, timelines), self._at_work = self._at_work, None
            stretch.end(at_ns)
            for timeline in timelines:
                stretch.record(timeline)

    def release(self, ticket: Ticket | None) -> None:
        """Let one member go before the others (continuous batching)."""
        with guarded():
            if ticket in self.tickets and self._timeline is not None:
                ticket.leave(self._timeline.clock())
                self.tickets.remove(ticket)

    def done(self) -> None:
        """Say that the batch is done; a second call, or one after `fail`, does nothing."""
        self._over(None)

    def fail(self, kind: type[BaseException]) -> None:
        """Say that the batch failed with an exception of type *kind*."""
        self._over(kind)

    def _over(self, kind: type[BaseException] | None) -> None:
        """End it; its slot is free then, whatever went wrong."""
        with guarded():
            error = kind.__name__.encode("utf-8", "replace") if kind else b""
            self._end(error, failed=kind is not None and issubclass(kind, Exception))
        with guarded():
            if self._timeline is not None and not self._timeline.done:
                self._timeline.discard()

    def _end(self, error: bytes, *, failed: bool) -> None:
        timeline = self._timeline
        if timeline is None or timeline.done:
            return
        at = timeline.clock()
        with guarded(timeline.recorder):
            self._end_stretch(at)
        with guarded(timeline.recorder):
            timeline.close_at(self._index, at, failed=failed)
            for ticket in self.tickets:
                ticket.leave(at, failed=failed)
        with guarded(timeline.recorder):
            self.tickets.clear()
            timeline.finish(at, self.device_ns, 0, 0, 0, self._size, 0, error, b"")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._over(kind)


@contextmanager
def working_for(formed: batch) -> Iterator[None]:
    """Charge the stages opened inside to all that *formed* has taken in.

    Batchers run in a task that inherited the context of whichever request happened to start it:
    without this its stages would be charged to that one.
    """
    timelines = timelines_of(formed)
    together = TimelineGroup(timelines) if timelines else None
    token = current.set(together)
    try:
        yield
    finally:
        if together is not None:
            together.done = True
        with suppress(ValueError):  # A generator may be closed in another context.
            current.reset(token)


def timelines_of(formed: batch) -> list[Timeline]:
    """Return the timelines of the members, and behind them the batch's own."""
    timelines = [ticket.timeline for ticket in formed.tickets]
    own = formed.timeline
    return [*timelines, own] if own is not None else timelines
