"""Saves how far each file is read, no further than what every sink has settled."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stagescope.agent.drain import Cursor, Cursors, Drain, save_cursors
from stagescope.agent.sinks import Mark, Sinks, mark
from stagescope.errors import StagescopeError

_log = logging.getLogger("stagescope")


@dataclass(frozen=True, slots=True)
class _Read:
    """A place in a file, or its end, and what the sinks had accepted when it was reached."""

    ring: str | Path
    """The id of one that goes on, the path of one that is read to its end."""
    place: Cursor | None
    mark: Mark


class Checkpoint:
    """Remembers the places that were read to, in order, until the sinks have settled them."""

    def __init__(
        self, spool: Path, sinks: Sinks, saved: Cursors, *, holds: Callable[[], bool] = lambda: True
    ) -> None:
        """*saved*: what the last agent saved.

        *holds* tells whether the spool is still ours: else its files are another agent's.
        """
        self._holds = holds
        self._spool = spool
        self._sinks = sinks
        self._waiting: deque[_Read] = deque()
        self._ends: set[Path] = set()
        self._settled = dict(saved)
        self._saved: Cursors = {}
        self.failures = 0
        """Times that the cursor file could not be written; the first is logged."""

    def note(self, ring_id: str, place: Cursor) -> None:
        """Note that a file was read to *place*, and every sink given what was before it."""
        now = mark(self._sinks)
        if self._waiting and self._waiting[-1].ring == ring_id and self._waiting[-1].mark == now:
            self._waiting.pop()
        self._waiting.append(_Read(ring_id, place, now))

    def advance(self, drain: Drain) -> None:
        """Save what is settled by now, and delete the files that are settled to their end."""
        for path in drain.ended():
            if path not in self._ends:
                self._ends.add(path)
                self._waiting.append(_Read(path, None, mark(self._sinks)))
        settled = {name: sink.settled for name, sink in self._sinks.items()}
        ended: list[Path] = []
        while self._waiting:
            first = self._waiting[0]
            if any(settled[name] < accepted for name, accepted in first.mark.items()):
                break
            self._waiting.popleft()
            if isinstance(first.ring, Path):
                ended.append(first.ring)
            elif first.place:
                self._settled[first.ring] = first.place
        drain.bury([path for path in drain.ended() if path in ended])
        self._ends.difference_update(ended)
        self._settled = {
            ring: self._settled[ring] for ring in drain.places() if ring in self._settled
        }
        self._save(self._settled)

    def _save(self, places: Cursors) -> None:
        if places == self._saved or not self._holds():
            return
        try:
            save_cursors(self._spool, places)
            self._saved = dict(places)
        except (OSError, StagescopeError) as problem:
            self.failures += 1
            if self.failures == 1:
                why = problem.strerror if isinstance(problem, OSError) else problem
                _log.warning(
                    "how far spool %s is read cannot be saved: %s; an agent that is restarted "
                    "will read some records twice", self._spool, why,
                )  # fmt: skip
