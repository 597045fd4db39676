"""Batches are recorded before their members: they are held until a member is kept."""

from __future__ import annotations

from stagescope.records import BatchRecord, State


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
        """Give a batch that is still remembered."""
        found = self._recent.get(batch_id)
        return found[0] if found else None

    def is_held(self, batch_id: str) -> bool:
        """Tell whether a batch still waits for a member that is kept."""
        found = self._recent.get(batch_id)
        return found is not None and not found[1]

    def release(self, batch_id: str) -> None:
        """Note that the batch's spans are on their way."""
        if found := self._recent.get(batch_id):
            self._recent[batch_id] = found[0], True


def keeps_batch(batch: BatchRecord) -> bool:
    """Tell whether *batch* keeps its spans whatever becomes of its members."""
    return bool(batch.run_id or batch.error) or batch.state is State.DIED


def _weight(batch: BatchRecord) -> int:
    return 4 + len(batch.members)
