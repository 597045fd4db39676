"""When a process that has started runs steadily: judged from the requests after its cold start.

The rule: of each route, the requests are taken in the order in which they were recorded, WINDOW at
a time. The process is steady from the end of the first window whose median duration lies within
TOLERANCE of the median of the window after it; the first route that gets there speaks for the
process. So it is known one window later, and says nothing of a process with fewer than
2 * WINDOW requests of one route.
"""

from __future__ import annotations

from statistics import median
from typing import Final

from stagescope.records import ColdStartRecord, RequestRecord

WINDOW: Final = 20
TOLERANCE: Final = 0.1
MAX_ROUTES: Final = 64
MAX_REQUESTS: Final = 100_000
"""Requests after which a process that never became steady is no longer looked at."""


class Steady:
    """Follows one process until it is steady; ask `add` about each of its requests."""

    def __init__(self, cold: ColdStartRecord) -> None:
        self._start_ns = cold.start_ns
        self._windows: dict[tuple[str, str], list[tuple[int, int]]] = {}
        self._last: dict[tuple[str, str], tuple[float, int]] = {}
        self._seen = 0

    @property
    def given_up(self) -> bool:
        """True where it is not worth looking further."""
        return self._seen >= MAX_REQUESTS

    def add(self, record: RequestRecord) -> int | None:
        """Give nanoseconds from the process's start until it was steady, once that is known."""
        self._seen += 1
        route = record.method, record.route
        if route not in self._windows and len(self._windows) >= MAX_ROUTES:
            return None
        window = self._windows.setdefault(route, [])
        window.append((record.duration_ns, record.start_ns + record.duration_ns))
        if len(window) < WINDOW:
            return None
        now = median([duration for duration, _ in window])
        before = self._last.get(route)
        self._last[route] = now, max(ended for _, ended in window)
        window.clear()
        if before is None or abs(before[0] - now) > TOLERANCE * now:
            return None
        return before[1] - self._start_ns
