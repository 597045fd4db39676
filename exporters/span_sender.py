"""The thread that sends spans; after a failure it waits, twice as long each time."""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Final

from stagescope.exporters.outlets import Outlet
from stagescope.exporters.quiet import suppressed_instrumentation, taken_log_records
from stagescope.exporters.span_exporter import Spans
from stagescope.exporters.span_queue import Outcome, SpanQueue, Waiting
from stagescope.exporters.spans import SpanBuilder
from stagescope.records import RequestRecord

MAX_PAUSE_S: Final = 30.0

_log = logging.getLogger(__name__)


class SpanSender(threading.Thread):
    """Empties a queue into an outlet until the queue is closed."""

    def __init__(self, queue: SpanQueue, outlet: Outlet[Spans]) -> None:
        super().__init__(name="stagescope-otlp", daemon=True)
        self.failed_exports = 0
        self._queue = queue
        self._outlet = outlet
        self._builder = SpanBuilder()
        self._failures = 0
        """In a row."""

    def run(self) -> None:
        """Send until the end; a failure while closing is the end too."""
        with taken_log_records() as said, suppressed_instrumentation():
            while taken := self._queue.take(self._pause_s()):
                if not self._send(taken, said) and self._queue.closing:
                    return

    def _pause_s(self) -> float:
        if not self._failures:
            return 0.0
        return float(min(self._queue.limits.delay_s * 2**self._failures, MAX_PAUSE_S))

    def _send(self, taken: list[Waiting], said: deque[str]) -> bool:
        said.clear()
        sent = False
        try:
            sent = self._outlet.send(self._spans(taken))
        except Exception as problem:  # noqa: BLE001 the guard: a library may raise anything
            said.append(f"{type(problem).__name__}: {problem}")
        finally:
            self._queue.settle(taken, Outcome.SENT if sent else Outcome.FAILED)
        self.failed_exports += not sent
        self._tell(sent, said)
        return sent

    def _spans(self, taken: list[Waiting]) -> Spans:
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
        elif not sent and not self._failures and not self._queue.closing:
            reason = (said[-1] if said else "no reason given").rstrip(".")
            _log.warning(
                "spans cannot be sent to %s: %s; they are dropped and counted until it takes them",
                self._outlet.name,
                reason,
            )
        self._failures = 0 if sent else min(self._failures + 1, 16)
