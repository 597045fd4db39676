"""The thread that sends: its beginning, its reports and its end, for spans and metrics alike."""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable
from typing import Final, Generic, TypeVar

from stagescope.exporters.otlp.transport import (
    Transport,
    suppressed_instrumentation,
    taken_log_records,
)

T = TypeVar("T")

STUCK_S: Final = 2.0
"""A call that takes longer is no reason to let records wait unread."""
GRACE_S: Final = 0.5
"""Of the time to close: for the thread to end after what it sends was aborted."""

_log = logging.getLogger(__name__)


class Sender(ABC, Generic[T]):
    """Sends on a thread of its own, so that nothing waits for a back end.

    That the back end fails is logged once, and once that it takes things again.
    """

    def __init__(self, transport: Transport[T], what: str, hint: str = "") -> None:
        """*what* is sent: `spans`, `metrics`; *hint* ends the sentence that says that it fails."""
        self.transport = transport
        self.failed_exports = 0
        self.failures = 0
        """In a row."""
        self.works = False
        """True while the last export succeeded; False until there was one."""
        self.closing = threading.Event()
        self._what = what
        self._hint = hint
        self._reasons: deque[str] = deque()
        """What the exporters logged."""
        self._since_s = 0.0
        """When the call in progress began."""
        self._thread = threading.Thread(
            target=self._run, name=f"stagescope-otlp-{what}", daemon=True
        )

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @abstractmethod
    def work(self) -> None:
        """Call `send` again and again, on the thread, until it is closed."""

    @property
    def stuck(self) -> bool:
        """True while a call to the back end takes long."""
        since_s = self._since_s
        return bool(since_s) and time.monotonic() - since_s > STUCK_S

    def _run(self) -> None:
        with taken_log_records() as self._reasons, suppressed_instrumentation():
            self.work()

    def send(
        self, make: Callable[[], T | None], settle: Callable[[bool], None] = lambda sent: None
    ) -> bool:
        """Send what *make* makes (None: nothing); False where that failed, or it was not taken.

        *settle* is called with the result, before anything is counted or logged.
        """
        self._reasons.clear()
        sent = False
        self._since_s = time.monotonic()
        try:
            what = make()
            sent = what is None or self.transport.send(what)
        except Exception as problem:  # noqa: BLE001 the guard: a library may raise anything
            self._reasons.append(f"{type(problem).__name__}: {problem}")
        finally:
            self._since_s = 0.0
            settle(sent)
        self.failed_exports += not sent
        self.works = sent
        self._report(sent)
        self.failures = 0 if sent else self.failures + 1
        return sent

    def _report(self, sent: bool) -> None:
        if sent and self.failures:
            _log.warning("%s takes %s again", self.transport.name, self._what)
        elif not sent and not self.failures and not self.closing.is_set():
            reason = (self._reasons[-1] if self._reasons else "no reason given").rstrip(".")
            _log.warning(
                "%s cannot be sent to %s: %s; they are dropped and counted until it takes them%s",
                self._what, self.transport.name, reason, self._hint,
            )  # fmt: skip

    def end(
        self,
        timeout_s: float,
        flush: Callable[[float], None] = lambda seconds: None,
        aborting: Callable[[], None] = lambda: None,
    ) -> bool:
        """Send what waits, and end the thread within *timeout_s*; False the second time.

        *flush* is called with how long it may send; *aborting* is called before what lasts longer is
        aborted.
        """
        if self.closing.is_set():
            return False
        grace_s = min(GRACE_S, timeout_s / 2)
        self.closing.set()
        flush(timeout_s - grace_s)
        self._thread.join(timeout_s - grace_s)
        aborting()
        self.transport.abort()
        self._thread.join(grace_s)
        return True
