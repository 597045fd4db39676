"""The requests that ended last, in memory, so that samples can be matched with them."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator, Sequence

from stagescope.agent.sinks import PromptSink
from stagescope.agent.store.serialize import lines
from stagescope.records import ColdStartRecord, Record, RequestRecord

MAX_REQUESTS = 2000
"""About 2 kB each. A server so busy that this is less than a few seconds serves many at once,
and then no single one could be named anyway."""


class RecentRequests(PromptSink):
    """A sink that keeps the newest MAX_REQUESTS requests; for the agent's own thread."""

    def __init__(self, most: int = MAX_REQUESTS) -> None:
        self.whole_since_ns = 0
        """From here on every request that ended is here."""
        self._newest: deque[RequestRecord] = deque(maxlen=most)

    def accept(self, records: Sequence[Record]) -> None:
        """Keep the requests among *records*."""
        for record in records:
            if isinstance(record, RequestRecord):
                if len(self._newest) == self._newest.maxlen:
                    gone = self._newest[0]
                    ended_ns = gone.start_ns + gone.duration_ns
                    self.whole_since_ns = max(self.whole_since_ns, ended_ns)
                self._newest.append(record)
        self.accepted += len(records)

    def of(self, ring_id: str, since_ns: int) -> list[RequestRecord]:
        """Return the requests of one process that ended since *since_ns* (monotonic)."""
        return [
            record
            for record in self._newest
            if record.process.ring_id == ring_id
            and record.start_ns + record.duration_ns >= since_ns
        ]


MAX_COLD_STARTS = 256


class ColdStarts(PromptSink):
    """A sink that keeps the newest MAX_COLD_STARTS cold starts; safe to use from several threads."""

    def __init__(self) -> None:
        self._seen = 0
        self._newest: deque[ColdStartRecord] = deque(maxlen=MAX_COLD_STARTS)
        self._lock = threading.Lock()

    def accept(self, records: Sequence[Record]) -> None:
        """Keep the cold starts among *records*."""
        with self._lock:
            for record in records:
                if isinstance(record, ColdStartRecord):
                    self._newest.append(record)
                    self._seen += 1
            self.accepted += len(records)

    def read(self) -> Iterator[bytes]:
        """Return what is kept, oldest first, as lines of serialize.py."""
        with self._lock:
            kept = list(self._newest)
        return (line.encode("ascii") for line in lines(kept))

    def counters(self) -> dict[str, int]:
        """Return how many there were, those forgotten included."""
        return {"seen": self._seen}
