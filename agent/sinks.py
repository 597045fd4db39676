"""The interface between the agent and what takes its records: exporters, the run store."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol, runtime_checkable

from stagescope.files import replace_file
from stagescope.recorder.spool import EXPORTING_NAME
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
        """Up to which of the accepted all are sent or given up; without a queue, all of them."""
        ...

    def accept(self, records: Sequence[Record]) -> None:
        """Take records, in the order in which one process committed them."""

    def counters(self) -> dict[str, int]:
        """Return what was dropped, refused or failed, by name."""
        ...

    def close(self, timeout_s: float) -> None:
        """Flush within the time and release everything."""


class PromptSink:
    """Of a sink without a queue: what it accepted is settled, and nothing is dropped."""

    accepted = 0

    @property
    def settled(self) -> int:
        """All that was accepted: nothing waits here."""
        return self.accepted

    def counters(self) -> dict[str, int]:
        """Return nothing."""
        return {}

    def close(self, timeout_s: float) -> None:
        """Do nothing."""


@runtime_checkable
class QueuedSink(Sink, Protocol):
    """A sink that settles later, from a thread of its own."""

    @property
    def has_room(self) -> bool:
        """False where records had better wait in their files for a moment."""
        ...

    def recall(self, records: Sequence[Record]) -> None:
        """Learn again what an earlier agent had read shortly before its end; nothing is sent."""

    def call_when_settled(self, call: Callable[[], None]) -> None:
        """Call *call* from any thread whenever something was settled."""


Sinks = Mapping[str, Sink]
"""By the name under which their counters are shown."""

Mark = dict[str, int]


def mark(sinks: Sinks) -> Mark:
    """Note what each sink has accepted."""
    return {name: sink.accepted for name, sink in sinks.items()}


def publish_export(spool: Path, sinks: Sinks) -> None:
    """Write into *spool* where spans are exported to, while that works; served processes look.

    They put their app's own spans under ours only then.
    """
    target = next((name for s in sinks.values() if (name := getattr(s, "exporting_to", ""))), "")
    if not target:
        withdraw_export(spool)
        return
    with suppress(OSError):  # Unpublished, the app's spans stay as they are.
        replace_file(spool / EXPORTING_NAME, target)


def withdraw_export(spool: Path) -> None:
    """Remove what `publish_export` wrote."""
    with suppress(OSError):
        (spool / EXPORTING_NAME).unlink()
