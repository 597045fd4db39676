"""The newest cold starts of the spool's processes, in memory: for whoever asks the control API."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from stagescope.agent.wire import lines
from stagescope.records import ColdStartRecord, Record

MOST = 256


class ColdStarts:
    """A sink that keeps the newest MOST cold starts; safe to use from several threads."""

    def __init__(self) -> None:
        self.accepted = 0
        self._seen = 0
        self._newest: deque[ColdStartRecord] = deque(maxlen=MOST)
        self._lock = threading.Lock()

    @property
    def settled(self) -> int:
        """All that was accepted: nothing waits here."""
        return self.accepted

    def accept(self, records: Sequence[Record]) -> None:
        """Keep the cold starts among *records*."""
        with self._lock:
            for record in records:
                if isinstance(record, ColdStartRecord):
                    self._newest.append(record)
                    self._seen += 1
            self.accepted += len(records)

    def read(self) -> Iterator[bytes]:
        """Give what is kept, oldest first, as lines of wire.py."""
        with self._lock:
            kept = list(self._newest)
        return (line.encode("ascii") for line in lines(kept))

    def counters(self) -> dict[str, int]:
        """Give how many there were, those forgotten included."""
        return {"seen": self._seen}

    def close(self, timeout_s: float) -> None:
        """Nothing waits here."""
