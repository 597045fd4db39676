"""What the agent keeps for a while, newest last, in bounded number: stacks, kernels."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Generic, Protocol, TypeVar


class Timed(Protocol):
    """Something that tells of a stretch of time."""

    @property
    def start_ns(self) -> int:
        """Its beginning, monotonic."""
        ...

    @property
    def end_ns(self) -> int:
        """Its end."""
        ...


T = TypeVar("T", bound=Timed)


class Kept(Generic[T]):
    """The newest *most* of what was added; any thread adds, any thread asks."""

    def __init__(self, most: int) -> None:
        self._kept: deque[T] = deque(maxlen=most)
        self._added = self._evicted = 0
        self._lock = threading.Lock()

    def add(self, new: Sequence[T]) -> None:
        """Keep *new* too."""
        with self._lock:
            room = (self._kept.maxlen or 0) - len(self._kept)
            self._evicted += max(0, len(new) - room)
            self._added += len(new)
            self._kept.extend(new)

    def between(self, since_ns: int, until_ns: int) -> list[T]:
        """Give what tells of any moment from *since_ns* to *until_ns*."""
        with self._lock:
            kept = list(self._kept)
        return [one for one in kept if one.end_ns >= since_ns and one.start_ns <= until_ns]

    def counters(self) -> dict[str, float]:
        """Give how many were added, and evicted to keep within bounds."""
        with self._lock:
            return {"added": self._added, "evicted": self._evicted}
