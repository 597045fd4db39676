"""The seam between the agent and whoever takes its records: exporters, the run store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from stagescope.records import Record


class Sink(Protocol):
    """Takes records; never blocks, and never raises for a back end's sake.

    What finds no room is dropped, newest first, and counted.
    """

    @property
    def accepted(self) -> int:
        """Records taken so far; only grows."""
        ...

    @property
    def settled(self) -> int:
        """How many of the accepted are sent or given up; a sink without a queue settles at once."""
        ...

    def accept(self, records: Sequence[Record]) -> None:
        """Take records, in the order in which one process committed them."""

    def counters(self) -> dict[str, int]:
        """Give what was dropped, refused or failed, by name."""
        ...

    def close(self, timeout_s: float) -> None:
        """Flush within the time and let go of everything."""


Sinks = Mapping[str, Sink]
"""By the name under which their counters are shown."""

Mark = dict[str, int]


def mark(sinks: Sinks) -> Mark:
    """Note what each sink has accepted."""
    return {name: sink.accepted for name, sink in sinks.items()}


def settled(sinks: Sinks, mark: Mark) -> bool:
    """Tell whether every sink has settled what it had accepted at *mark*."""
    return all(sinks[name].settled >= accepted for name, accepted in mark.items())
