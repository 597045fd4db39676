"""Sends records as OTLP spans: keeps by policy, queues within bounds, never waits."""

from __future__ import annotations

from collections.abc import Sequence

from stagescope.exporters.held_batches import HeldBatches, keeps_batch
from stagescope.exporters.keep import KeepPolicy
from stagescope.exporters.outlets import Outlet
from stagescope.exporters.span_exporter import Spans, span_outlet_from_environment
from stagescope.exporters.span_queue import (
    QueueLimits,
    SpanQueue,
    Waiting,
    limits_from_environment,
)
from stagescope.exporters.span_sender import SpanSender
from stagescope.exporters.spans import BatchLink
from stagescope.records import BatchRecord, ColdStartRecord, Record, RequestRecord


def otlp_from_environment(keep: KeepPolicy | None = None) -> OtlpSpans | None:
    """Give the sink that the standard `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError, which names the variable, for a value that cannot be used.
    """
    limits, policy = limits_from_environment(), keep or KeepPolicy()
    outlet = span_outlet_from_environment()
    return OtlpSpans(outlet, policy, limits) if outlet else None


class OtlpSpans:
    """A sink: takes records at once, sends their spans when it can, counts what it cannot.

    What finds the queue full is dropped, newest first. `accept` and `close` belong to one
    thread; everything else may be asked from any.
    """

    def __init__(
        self, outlet: Outlet[Spans], keep: KeepPolicy, limits: QueueLimits | None = None
    ) -> None:
        self.accepted = 0
        self._outlet = outlet
        self._keep = keep
        self._batches = HeldBatches()
        self._not_kept = 0
        self._unknown_batches = 0
        self._queue = SpanQueue(limits or QueueLimits())
        self._sender = SpanSender(self._queue, outlet)
        self._sender.start()

    @property
    def settled(self) -> int:
        """Records that were sent or given up; a batch that waits for its members counts so."""
        return self.accepted - self._queue.unsettled

    @property
    def queued_spans(self) -> int:
        """Spans that wait now."""
        return self._queue.queued_spans

    def certain(self, record: RequestRecord) -> bool:
        """Tell whether the trace of *record* is sure to be sent, as far as room allows."""
        return self._keep.certain(record)

    def accept(self, records: Sequence[Record]) -> None:
        """Take *records*; never waits for the back end."""
        for record in records:
            self.accepted += 1
            if isinstance(record, BatchRecord):
                kept = keeps_batch(record) and self._queue.put(Waiting((record,)))
                self._batches.add(record, kept=kept)
            elif isinstance(record, ColdStartRecord):
                self._queue.put(Waiting((record,)))
            elif self._keep.reason(record):
                self._put_request(record)
            else:
                self._not_kept += 1

    def counters(self) -> dict[str, int]:
        """Give what was sent, dropped and why; all of them only grow."""
        return {
            **self._queue.counters(),
            "failed_exports": self._sender.failed_exports,
            "not_kept_requests": self._not_kept,
            "unknown_batches": self._unknown_batches,
        }

    def close(self, timeout_s: float) -> None:
        """Send what waits for at most *timeout_s*, count the rest as dropped, end the thread."""
        if self._queue.closing:
            return
        grace_s = min(0.5, timeout_s / 2)
        self._queue.close(timeout_s - grace_s)
        self._sender.join(timeout_s - grace_s)
        self._outlet.abort()
        self._sender.join(grace_s)
        self._queue.give_up()

    def _put_request(self, record: RequestRecord) -> None:
        """Queue a request, and with it those of its batches that were not kept so far."""
        known = [batch for name in record.batch_ids if (batch := self._batches.get(name))]
        self._unknown_batches += len(record.batch_ids) - len(known)
        links = tuple([BatchLink(batch.trace_id, batch.batch_id) for batch in known])
        held = [batch for batch in known if self._batches.is_held(batch.batch_id)]
        if self._queue.put(Waiting((*held, record), links)):
            for batch in held:
                self._batches.release(batch.batch_id)
