"""Sinks that keep what they are given, to look at."""

from __future__ import annotations

from collections.abc import Sequence

from stagescope.records import Record


class KeepingSink:
    """Keeps every record; settles at once, or when told to."""

    def __init__(self, *, settles: bool = True) -> None:
        self.records: list[Record] = []
        self.settles = settles
        self.closed_after_s: float | None = None
        self._settled = 0

    @property
    def accepted(self) -> int:
        """Records taken."""
        return len(self.records)

    @property
    def settled(self) -> int:
        """All of them, or as many as `settle` said."""
        return len(self.records) if self.settles else self._settled

    def settle(self) -> None:
        """Settle what was taken so far."""
        self._settled = len(self.records)

    def accept(self, records: Sequence[Record]) -> None:
        """Keep them."""
        self.records.extend(records)

    def counters(self) -> dict[str, int]:
        """Return how many are kept."""
        return {"kept": len(self.records)}

    def close(self, timeout_s: float) -> None:
        """Remember how long there was."""
        self.closed_after_s = timeout_s
