"""Tests a hook against planted times: what a request shows, beside what was really spent in it."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from stagescope.testing.recording import Recording

SHARE, LEAST_NS = 0.15, 1_000_000
"""A stage is right within this share of the planted time, or within this."""


class Planted:
    """Times that a stand-in of a framework spends in its stages, taken where they are spent."""

    def __init__(self) -> None:
        self.spent_ns: dict[str, int] = {}

    def spend(self, stage: str, seconds: float) -> None:
        """Sleep for *seconds*, and note under *stage* how long that really was."""
        began = time.monotonic_ns()
        time.sleep(seconds)
        self.spent_ns[stage] = self.spent_ns.get(stage, 0) + time.monotonic_ns() - began

    def check(self, call: Callable[[], object]) -> dict[str, int]:
        """Make *call* in a request of its own; return the nanoseconds that each stage shows.

        Raises AssertionError where a planted stage is off by more than 15 % and 1 ms, or where a
        stage shows more than 1 ms that nobody planted.
        """
        self.spent_ns.clear()
        with tempfile.TemporaryDirectory() as folder, closing(Recording(Path(folder))) as recording:
            with recording.request():
                call()
            shown = dict(recording.requests[-1].self_ns())
        for stage in self.spent_ns.keys() | shown.keys() - {"other"}:
            planted, found = self.spent_ns.get(stage, 0), shown.get(stage, 0)
            if abs(found - planted) > max(SHARE * planted, LEAST_NS):
                raise AssertionError(
                    f"{stage}: {planted / 1e6:.1f} ms were planted, the request shows "
                    f"{found / 1e6:.1f} ms; all of it: {shown}"
                )
        return shown
