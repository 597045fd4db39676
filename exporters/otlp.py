"""Sends records as OTLP spans, from a bounded queue, on one thread of its own."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from opentelemetry.sdk.trace import ReadableSpan

from stagescope.errors import UsageError
from stagescope.exporters.keep import Batches, KeepPolicy, keeps_batch
from stagescope.exporters.quiet import suppressed_instrumentation, taken_log_records
from stagescope.exporters.span_exporter import Outlet, outlet_from_environment
from stagescope.exporters.spans import BatchLink, SpanBuilder
from stagescope.records import BatchRecord, Record, RequestRecord

MAX_PAUSE_S: Final = 30.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much waits, how much goes at once, and how long it waits to become that much."""

    max_spans: int = 65_536
    batch_spans: int = 2_048
    delay_s: float = 1.0


def limits_from_environment(environ: Mapping[str, str] = os.environ) -> QueueLimits:
    """Give the limits that `OTEL_BSP_*` ask for, ours where they do not.

    Raises UsageError for what is no whole number above 0.
    """
    default = QueueLimits()
    delay_ms = _whole(environ, "OTEL_BSP_SCHEDULE_DELAY", round(default.delay_s * 1000))
    most = _whole(environ, "OTEL_BSP_MAX_QUEUE_SIZE", default.max_spans)
    at_once = _whole(environ, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", default.batch_spans)
    return QueueLimits(most, min(at_once, most), delay_ms / 1000)


def _whole(environ: Mapping[str, str], variable: str, default: int) -> int:
    text = environ.get(variable, "").strip()
    if not text:
        return default
    if not text.isdecimal() or int(text) == 0:
        raise UsageError(f"{variable}={text!r} is not a whole number above 0")
    return int(text)


def otlp_from_environment(keep: KeepPolicy | None = None) -> OtlpSpans | None:
    """Give the sink that the standard `OTEL_*` variables ask for; None where they ask for none.

    Raises UsageError, which names the variable, for a value that cannot be used.
    """
    outlet = outlet_from_environment()
    if outlet is None:
        return None
    return OtlpSpans(outlet, keep or KeepPolicy(), limits_from_environment())


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A request with the batches that are kept for its sake, or a batch; sent as one."""

    records: tuple[Record, ...]
    links: tuple[BatchLink, ...]
    spans: int


class OtlpSpans:
    """A sink: takes records at once, sends their spans when it can, counts what it cannot.

    What finds the queue full is dropped, newest first. Close it to send what waits.
    """

    def __init__(self, outlet: Outlet, keep: KeepPolicy, limits: QueueLimits | None = None) -> None:
        self.accepted = 0
        self._outlet = outlet
        self._keep = keep
        self._limits = limits or QueueLimits()
        self._batches = Batches()
        self._queue: deque[_Waiting] = deque()
        self._queued_spans = 0
        self._unsettled = 0
        self._counts = dict.fromkeys(
            ("not_kept", "sent_spans", "dropped_full_spans", "dropped_failed_spans",
             "dropped_closed_spans", "failed_exports", "unknown_batches"), 0,
        )  # fmt: skip
        self._wake = threading.Condition()
        self._closing = False
        self._flush_until = 0.0
        self._sender = _Sender(self, outlet)
        self._sender.start()

    @property
    def settled(self) -> int:
        """Records that were sent or given up."""
        return self.accepted - self._unsettled

    def accept(self, records: Sequence[Record]) -> None:
        """Take *records*; never waits for the back end."""
        with self._wake:
            for record in records:
                if isinstance(record, RequestRecord):
                    self._accept_request(record)
                else:
                    self._accept_batch(record)
            self.accepted += len(records)
            if self._queued_spans >= self._limits.batch_spans:
                self._wake.notify()

    def counters(self) -> dict[str, int]:
        """Give what was sent, dropped and why; numbers of spans unless a name says otherwise."""
        with self._wake:
            return {**self._counts, "queued_spans": self._queued_spans}

    def close(self, timeout_s: float) -> None:
        """Send what waits for at most *timeout_s*, count the rest as dropped, end the thread."""
        grace_s = min(0.5, timeout_s / 2)
        with self._wake:
            if self._closing:
                return
            self._closing = True
            self._flush_until = time.monotonic() + timeout_s - grace_s
            self._wake.notify()
        self._sender.join(max(0.0, timeout_s - grace_s))
        self._outlet.abort()
        self._sender.join(grace_s)
        with self._wake:
            self._give_up_queue()

    def _accept_request(self, record: RequestRecord) -> None:
        if self._keep.reason(record) is None:
            self._counts["not_kept"] += 1
            return
        links: list[BatchLink] = []
        waiting: list[BatchRecord] = []
        for batch_id in record.batch_ids:
            if batch := self._batches.get(batch_id):
                links.append(BatchLink(batch.trace_id, batch_id))
            else:
                self._counts["unknown_batches"] += 1
            if held := self._batches.waiting(batch_id):
                waiting.append(held)
        if self._put((*waiting, record), tuple(links)):
            for batch in waiting:
                self._batches.sent(batch.batch_id)

    def _accept_batch(self, batch: BatchRecord) -> None:
        kept = keeps_batch(batch) and self._put((batch,), ())
        self._batches.add(batch, kept=kept)

    def _put(self, records: tuple[Record, ...], links: tuple[BatchLink, ...]) -> bool:
        spans = sum([1 + len(record.stages) for record in records])
        if self._closing or self._queued_spans + spans > self._limits.max_spans:
            reason = "dropped_closed_spans" if self._closing else "dropped_full_spans"
            self._counts[reason] += spans
            return False
        self._queue.append(_Waiting(records, links, spans))
        self._queued_spans += spans
        self._unsettled += 1
        return True

    # What follows is called by the sender's thread.

    def take(self, pause_s: float) -> list[_Waiting] | None:
        """Wait for something to send, at least *pause_s* long; None at the end."""
        with self._wake:
            if pause_s:
                self._wake.wait_for(lambda: self._closing, pause_s)
            while not self._wake.wait_for(self._is_due, self._limits.delay_s) and not self._queue:
                continue
            if not self._queue or (self._closing and time.monotonic() > self._flush_until):
                return None
            return self._take_batch()

    def settle(self, taken: Sequence[_Waiting], outcome: str) -> None:
        """Count *taken* as sent, or as dropped for the reason that *outcome* names."""
        with self._wake:
            self._counts[outcome] += sum(waiting.spans for waiting in taken)
            self._counts["failed_exports"] += outcome == "dropped_failed_spans"
            self._unsettled -= len(taken)

    @property
    def closing(self) -> bool:
        """True once nothing more is accepted."""
        return self._closing

    @property
    def delay_s(self) -> float:
        """How long a batch may take to fill."""
        return self._limits.delay_s

    def _is_due(self) -> bool:
        return self._closing or self._queued_spans >= self._limits.batch_spans

    def _take_batch(self) -> list[_Waiting]:
        taken = [self._queue.popleft()]
        spans = taken[0].spans
        while self._queue and spans + self._queue[0].spans <= self._limits.batch_spans:
            taken.append(self._queue.popleft())
            spans += taken[-1].spans
        self._queued_spans -= spans
        return taken

    def _give_up_queue(self) -> None:
        self._counts["dropped_closed_spans"] += self._queued_spans
        self._unsettled -= len(self._queue)
        self._queue.clear()
        self._queued_spans = 0


class _Sender(threading.Thread):
    """Sends one batch after the other; after a failure it waits, twice as long each time."""

    def __init__(self, sink: OtlpSpans, outlet: Outlet) -> None:
        super().__init__(name="stagescope-otlp", daemon=True)
        self._sink = sink
        self._outlet = outlet
        self._builder = SpanBuilder()
        self._failures = 0

    def run(self) -> None:
        """Send until the sink is closed."""
        with taken_log_records() as said, suppressed_instrumentation():
            while taken := self._sink.take(self._pause_s()):
                if not self._send(taken, said) and self._sink.closing:
                    return

    def _pause_s(self) -> float:
        if not self._failures:
            return 0.0
        return float(min(self._sink.delay_s * 2**self._failures, MAX_PAUSE_S))

    def _send(self, taken: list[_Waiting], said: deque[str]) -> bool:
        said.clear()
        sent = False
        try:
            sent = self._outlet.send(self._spans(taken))
        except Exception as problem:  # noqa: BLE001 the guard: a library may raise anything
            said.append(f"{type(problem).__name__}: {problem}")
        finally:
            self._sink.settle(taken, "sent_spans" if sent else "dropped_failed_spans")
        self._tell(sent, said)
        return sent

    def _spans(self, taken: list[_Waiting]) -> list[ReadableSpan]:
        return [
            span
            for waiting in taken
            for record in waiting.records
            for span in self._builder.spans(
                record, waiting.links if isinstance(record, RequestRecord) else ()
            )
        ]

    def _tell(self, sent: bool, said: deque[str]) -> None:
        """Say once that the back end fails, and once that it is back."""
        if sent and self._failures:
            _log.warning("%s takes spans again", self._outlet.name)
        elif not sent and not self._failures and not self._sink.closing:
            reason = said[-1] if said else "no reason given"
            _log.warning(
                "spans cannot be sent to %s: %s; they are dropped and counted until it takes them",
                self._outlet.name, reason,
            )  # fmt: skip
        self._failures = 0 if sent else min(self._failures + 1, 16)
