"""What waits to be sent: bounded, newest dropped first, every drop counted."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf

from stagescope.exporters.otlp.batch_links import BatchLink, further_holders, has_trace
from stagescope.exporters.otlp.environment import whole
from stagescope.exporters.tail_sampling import Kept
from stagescope.records import BatchRecord, Record, RequestRecord, State

FEW_SPANS = 256


@dataclass(frozen=True, slots=True)
class QueueLimits:
    """How much waits, how much goes at once at most, and how long it waits to become a batch."""

    max_spans: int = 65_536
    batch_spans: int = 2_048
    delay_s: float = 1.0

    def at_once(self, waiting: int) -> int:
        """Return how many spans are sent at once where so many wait.

        Few, since an agent that is killed sends again what was under way; more where a slow back
        end would not keep up with few.
        """
        return min(self.batch_spans, max(FEW_SPANS, waiting // 16))


def limits_from_environment(environ: Mapping[str, str] = os.environ) -> QueueLimits:
    """Return the limits that `OTEL_BSP_*` ask for, ours where they do not.

    Raises UsageError for what is no whole number above 0.
    """
    default = QueueLimits()
    delay_ms = whole(environ, "OTEL_BSP_SCHEDULE_DELAY", round(default.delay_s * 1000))
    most = whole(environ, "OTEL_BSP_MAX_QUEUE_SIZE", default.max_spans)
    at_once = whole(environ, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", default.batch_spans)
    return QueueLimits(most, min(at_once, most), delay_ms / 1000)


class Outcome(StrEnum):
    """What became of spans; the counter of that name counts them."""

    SENT = "sent_spans"
    FULL = "dropped_full_spans"
    """The queue had no room."""
    FAILED = "dropped_failed_spans"
    """The back end did not take them."""
    REJECTED = "rejected_spans"
    """The back end took the others of the same request, and rejected these."""
    CLOSED = "dropped_closed_spans"
    """They were still waiting at the end."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request with the batches that are kept for its sake, or a batch; sent as one."""

    records: tuple[Record, ...]
    links: tuple[BatchLink, ...] = ()
    """The batches that the request was a member of."""
    kept: Kept | None = None
    """Why, and by what probability."""

    def kept_as(self, record: Record) -> Kept | None:
        """Return the same of one of its records.

        That of a batch is known only where one of its members is always kept.
        """
        if isinstance(record, RequestRecord) or self.kept is None or not self.kept.threshold:
            return self.kept
        return Kept(self.kept.reason, None)

    @property
    def spans(self) -> int:
        """How many spans it becomes."""
        return sum([spans_of(record) for record in self.records])


def spans_of(record: Record) -> int:
    """Return how many spans *record* becomes."""
    further = further_holders(record) if isinstance(record, BatchRecord) else 0
    return 1 + len(record.stages) + further


class SpanQueue:
    """Between the agent's thread, which never waits here, and the sender's, which does."""

    def __init__(self, limits: QueueLimits) -> None:
        self.limits = limits
        self.offered = 0
        """Spans that were put in or dropped at the door."""
        self._waiting: deque[tuple[Waiting, int, int]] = deque()
        """With its spans and its number."""
        self._in_hand: int | None = None
        """The number of the first of what is being sent."""
        self._spans = 0
        self._counts = dict.fromkeys(Outcome, 0)
        self._changed = threading.Condition()
        self._closing = False
        self._flush_until = 0.0

    def put(self, waiting: Waiting, number: int) -> bool:
        """Add *waiting*; False, and counted as dropped, where there is no room.

        *number* only grows: `oldest` is the smallest that has not been settled.
        """
        spans = waiting.spans
        with self._changed:
            self.offered += spans
            if self._closing or self._spans + spans > self.limits.max_spans:
                self._counts[Outcome.CLOSED if self._closing else Outcome.FULL] += spans
                return False
            self._waiting.append((waiting, spans, number))
            self._spans += spans
            if self._spans >= self.limits.at_once(0):
                self._changed.notify()
        return True

    def take(self, pause_s: float, most: float = inf) -> list[Waiting]:
        """Wait *pause_s*, then for something to send, *most* spans; empty at the end."""
        with self._changed:
            if pause_s:
                self._changed.wait_for(lambda: self._closing, pause_s)
            while not self._changed.wait_for(self._is_due, self.limits.delay_s):
                if self._waiting:
                    break
            if self._closing and time.monotonic() >= self._flush_until:
                return []
            return self._take_batch(most)

    def settle(self, taken: Sequence[Waiting], outcome: Outcome, rejected: int = 0) -> None:
        """Count what was taken as sent, or as dropped; *rejected* of its spans as rejected."""
        with self._changed:
            spans = sum([waiting.spans for waiting in taken])
            rejected = min(rejected, spans)
            self._counts[outcome] += spans - rejected
            self._counts[Outcome.REJECTED] += rejected
            self._in_hand = None

    @property
    def oldest(self) -> int | None:
        """Return the number of the oldest that is neither sent nor given up; None where none is."""
        with self._changed:
            if self._in_hand is not None:
                return self._in_hand
            return self._waiting[0][2] if self._waiting else None

    def close(self, flush_s: float) -> None:
        """Accept nothing more; `take` goes on for *flush_s*."""
        with self._changed:
            self._closing = True
            self._flush_until = time.monotonic() + flush_s
            self._changed.notify()

    def give_up(self) -> None:
        """Drop what still waits."""
        with self._changed:
            self._counts[Outcome.CLOSED] += self._spans
            self._waiting.clear()
            self._spans = 0

    def counters(self) -> dict[str, int]:
        """Return spans by what became of them."""
        with self._changed:
            return {outcome.value: count for outcome, count in self._counts.items()}

    @property
    def queued_spans(self) -> int:
        """Spans that wait now."""
        return self._spans

    def _is_due(self) -> bool:
        return self._closing or self._spans >= self.limits.at_once(0)

    def _take_batch(self, most: float) -> list[Waiting]:
        taken: list[Waiting] = []
        room = min(self.limits.at_once(self._spans), most)
        while self._waiting and (not taken or self._waiting[0][1] <= room):
            waiting, spans, number = self._waiting.popleft()
            if not taken:
                self._in_hand = number
            taken.append(waiting)
            self._spans -= spans
            room -= spans
        return taken


class HeldBatches:
    """Recent batches, held until a member is kept: a batch is recorded before its members.

    Bounded by the members that the held batches name; the oldest goes first.
    """

    def __init__(self, max_members: int = 32_768) -> None:
        self._max_members = max_members
        self._members = 0
        self._recent: dict[str, tuple[BatchRecord, bool]] = {}

    def add(self, batch: BatchRecord, *, kept: bool) -> None:
        """Remember *batch*; *kept* where its spans are on their way already."""
        self._recent[batch.batch_id] = batch, kept
        self._members += _weight(batch)
        while self._members > self._max_members and len(self._recent) > 1:
            oldest, _ = self._recent.pop(next(iter(self._recent)))
            self._members -= _weight(oldest)

    def get(self, batch_id: str) -> BatchRecord | None:
        """Return a batch that is still remembered."""
        found = self._recent.get(batch_id)
        return found[0] if found else None

    def is_held(self, batch_id: str) -> bool:
        """Return whether a batch still waits for a member that is kept."""
        found = self._recent.get(batch_id)
        return found is not None and not found[1] and has_trace(found[0])

    def release(self, batch_id: str) -> None:
        """Note that the batch's spans are on their way."""
        if found := self._recent.get(batch_id):
            self._recent[batch_id] = found[0], True


def keeps_batch(batch: BatchRecord) -> bool:
    """Return whether *batch* keeps its spans whatever becomes of its members."""
    wanted = bool(batch.run_id or batch.error) or batch.state is State.DIED
    return wanted and has_trace(batch)


def _weight(batch: BatchRecord) -> int:
    return 4 + len(batch.members)
