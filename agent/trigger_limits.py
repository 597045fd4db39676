"""How often triggers may start something: a pure count of what was started when."""

from __future__ import annotations

from collections import deque
from typing import Final

MIN_GAP_S: Final = 60.0
"""Between two of one kind."""
MOST_AN_HOUR: Final = 10
"""Of all kinds together."""

_HOUR_NS: Final = 3600 * 10**9


class TriggerLimits:
    """Remembers what was started in the last hour."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._started: deque[int] = deque()

    def allow(self, kind: str, now_ns: int) -> bool:
        """Tell whether one of *kind* may be started now."""
        while self._started and now_ns - self._started[0] >= _HOUR_NS:
            self._started.popleft()
        last_ns = self._last.get(kind)
        rested = last_ns is None or now_ns - last_ns >= MIN_GAP_S * 1e9
        return rested and len(self._started) < MOST_AN_HOUR

    def note(self, kind: str, now_ns: int) -> None:
        """Remember that one was started."""
        self._last[kind] = now_ns
        self._started.append(now_ns)
