"""A clock that moves only when a test moves it."""

from __future__ import annotations


class HandClock:
    """Call it for the time in ns; it does not move until `tick` moves it."""

    def __init__(self, now_ns: int = 1_000_000_000) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        return self.now_ns

    def tick(self, ns: int) -> int:
        """Move on by *ns* and return the new time."""
        self.now_ns += ns
        return self.now_ns
