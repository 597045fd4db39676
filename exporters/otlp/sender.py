"""Sends records as OTLP spans: keeps by policy, queues within bounds, never waits."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from typing import Final

from stagescope.exporters.otlp.batch_links import batch_link
from stagescope.exporters.otlp.environment import TRACES
from stagescope.exporters.otlp.queue import (
    FEW_SPANS,
    HeldBatches,
    Outcome,
    QueueLimits,
    SpanQueue,
    Waiting,
    keeps_batch,
    limits_from_environment,
)
from stagescope.exporters.otlp.sending import STUCK_S, Sender
from stagescope.exporters.otlp.spans import SpanBuilder
from stagescope.exporters.otlp.transport import Spans, Transport, transport_from_environment
from stagescope.exporters.tail_sampling import Kept, Reason, TailSampler
from stagescope.records import BatchRecord, ColdStartRecord, Record, RequestRecord, State

MAX_PAUSE_S: Final = 30.0
CATCH_UP: Final = 2.5
"""After an outage spans are sent so many times as fast as they come: three times, with what one
delivery more or less makes of any few seconds."""
PACED_S: Final = 0.5
"""While they are, a delivery holds what may be sent in so long."""
LEAST_PACE: Final = 100.0
"""Spans a second, where hardly any came."""
LONGEST_HOLD_S: Final = 10.0
"""How long records wait unread at most, at a back end that is well and too slow."""

_log = logging.getLogger(__name__)


class SpanSender(Sender[Spans]):
    """Empties a queue into a transport until the queue is closed."""

    def __init__(self, queue: SpanQueue, transport: Transport[Spans]) -> None:
        super().__init__(transport, "spans")
        self._queue = queue
        self._builder = SpanBuilder()
        self._rejects = False
        self._calm_until_s = 0.0
        self._offered_before = 0
        """Spans offered until then."""
        self._pace = 0.0
        """Spans a second while what an outage, or a call that hung, left is sent; else 0."""
        self._after_failure = False
        """The pace is for the sake of an outage."""
        self._sent_last, self._call_s = 0, 0.0
        self.on_settled: Callable[[], None] = lambda: None

    @property
    def keeps_up(self) -> bool:
        """False in an outage, in a call that hangs, and until an outage is caught up with."""
        return not (self.failures or self._after_failure or self.stuck)

    def work(self) -> None:
        """Send until the end; a failure while closing is the end too."""
        while taken := self._queue.take(self._pause_s(), self._most()):
            began_s = time.monotonic()
            failed_before = bool(self.failures)
            if not failed_before:
                self._calm_until_s, self._offered_before = began_s, self._queue.offered
            sent = self.send(partial(self._spans, taken), partial(self._settle, taken))
            self._call_s = time.monotonic() - began_s
            if sent:
                self._set_pace(taken, failed_before=failed_before)
            elif self.closing.is_set():
                return

    def _settle(self, taken: list[Waiting], sent: bool) -> None:
        rejected = self.transport.rejected() if sent else 0
        self._queue.settle(taken, Outcome.SENT if sent else Outcome.FAILED, rejected)
        self.on_settled()
        if rejected and not self._rejects:
            self._rejects = True
            _log.warning(
                "%s rejects %d of the spans of one request; logged once, counted in rejected_spans",
                self.transport.name, rejected,
            )  # fmt: skip

    def _pause_s(self) -> float:
        if not self.failures:
            return max(0.0, self._sent_last / self._pace - self._call_s) if self._pace else 0.0
        return float(min(self._queue.limits.delay_s * 2 ** min(self.failures, 16), MAX_PAUSE_S))

    def _most(self) -> float:
        """Return how many spans go at once: an attempt in an outage may lose them, so few then."""
        if self.failures:
            return FEW_SPANS
        return self._pace * PACED_S if self._pace else inf

    def _set_pace(self, taken: list[Waiting], *, failed_before: bool) -> None:
        """After an outage, or a call that hung, send what waited no faster than is polite.

        An outage of a few seconds is one such call: the exporter tries again within it.
        """
        took_s = time.monotonic() - self._calm_until_s
        if failed_before or took_s > STUCK_S:
            came = self._queue.offered - self._offered_before
            self._pace = max(LEAST_PACE, CATCH_UP * came / max(1.0, took_s))
            self._after_failure = self._after_failure or failed_before
        if self._queue.queued_spans < min(self._pace, self._queue.limits.batch_spans):
            self._pace, self._after_failure = 0.0, False
        self._sent_last = sum([waiting.spans for waiting in taken])

    def _spans(self, taken: list[Waiting]) -> Spans:
        return [
            span
            for waiting in taken
            for record in waiting.records
            for span in self._builder.spans(record, waiting.links, waiting.kept_as(record))
        ]


def otlp_from_environment(keep: TailSampler | None = None) -> OtlpSpans | None:
    """Return the sink that the standard `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError, which names the variable, for a value that cannot be used.
    """
    limits, policy = limits_from_environment(), keep or TailSampler()
    transport: Transport[Spans] | None = transport_from_environment(TRACES)
    return OtlpSpans(transport, policy, limits) if transport else None


class OtlpSpans:
    """A sink: takes records at once, sends their spans when it can, counts what it cannot.

    What finds the queue full is dropped, newest first. `accept` and `close` belong to one
    thread; everything else may be asked from any.
    """

    def __init__(
        self, transport: Transport[Spans], keep: TailSampler, limits: QueueLimits | None = None
    ) -> None:
        self.accepted = 0
        self._keep = keep
        self._batches = HeldBatches()
        self._not_kept = 0
        self._unknown_batches = 0
        self._full_since_s = 0.0
        self._abandoned: int | None = None
        """The number of the first record that was still waiting at the end."""
        self._queue = SpanQueue(limits or QueueLimits())
        self._sender = SpanSender(self._queue, transport)
        self._sender.start()

    @property
    def settled(self) -> int:
        """Records, counted from the first, all of which were sent or given up.

        A batch that waits for its members counts so: it is recalled after a restart. What was
        waiting at the end does not: the next agent reads it again.
        """
        accepted = self.accepted
        oldest = self._queue.oldest if self._abandoned is None else self._abandoned
        return accepted if oldest is None else oldest - 1

    @property
    def has_room(self) -> bool:
        """False where records had better wait in their files: the queue is half full.

        True, whatever the queue, where waiting would not help soon: what finds it full is then
        dropped and counted, and all other sinks go on.
        """
        limit = self._queue.limits.max_spans
        if self._queue.queued_spans <= limit // 2 or not self._sender.keeps_up:
            self._full_since_s = 0.0
            return True
        now_s = time.monotonic()
        self._full_since_s = self._full_since_s or now_s
        return now_s - self._full_since_s > LONGEST_HOLD_S

    def call_when_settled(self, call: Callable[[], None]) -> None:
        """Call *call*, on the sender's thread, after each sending."""
        self._sender.on_settled = call

    def recall(self, records: Sequence[Record]) -> None:
        """Remember the batches among *records*, which an earlier agent has settled."""
        for record in records:
            if isinstance(record, BatchRecord):
                self._batches.add(record, kept=keeps_batch(record))

    @property
    def exporting_to(self) -> str:
        """The back end that took the last export; empty where it did not, or there was none."""
        return self._sender.transport.name if self._sender.works else ""

    @property
    def queued_spans(self) -> int:
        """Spans that wait now."""
        return self._queue.queued_spans

    def certain(self, record: RequestRecord) -> bool:
        """Return whether the trace of *record* is sure to be sent, as far as room allows."""
        return self._keep.certain(record)

    def accept(self, records: Sequence[Record]) -> None:
        """Take *records*; never waits for the back end."""
        for record in records:
            self.accepted += 1
            if isinstance(record, BatchRecord):
                kept = keeps_batch(record) and self._queue.put(_alone(record), self.accepted)
                self._batches.add(record, kept=kept)
            elif isinstance(record, ColdStartRecord):
                self._queue.put(Waiting((record,)), self.accepted)
            elif kept_as := self._keep.kept(record):
                self._put_request(record, kept_as)
            else:
                self._not_kept += 1

    def counters(self) -> dict[str, int]:
        """Return what was sent, dropped and why; all of them only grow."""
        return {
            **self._queue.counters(),
            "failed_exports": self._sender.failed_exports,
            "not_kept_requests": self._not_kept,
            "unknown_batches": self._unknown_batches,
        }

    def close(self, timeout_s: float) -> None:
        """Send what waits for at most *timeout_s*, count the rest, end the thread."""
        if self._sender.end(timeout_s, self._queue.close, self._abandon):
            self._queue.give_up()

    def _abandon(self) -> None:
        self._abandoned = self._queue.oldest

    def _put_request(self, record: RequestRecord, kept: Kept) -> None:
        """Queue a request, and with it those of its batches that were not kept so far."""
        known = [batch for name in record.batch_ids if (batch := self._batches.get(name))]
        self._unknown_batches += len(record.batch_ids) - len(known)
        links = tuple([batch_link(batch, record) for batch in known])
        held = [batch for batch in known if self._batches.is_held(batch.batch_id)]
        waiting = Waiting((*held, record), links, kept)
        if self._queue.put(waiting, self.accepted):
            for batch in held:
                self._batches.release(batch.batch_id)


def _alone(batch: BatchRecord) -> Waiting:
    reason = Reason.ERROR if batch.error or batch.state is State.DIED else Reason.LOAD_RUN
    return Waiting((batch,), kept=Kept(reason, 0))
