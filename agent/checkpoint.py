"""Saves how far each file is read, no further than what every sink has settled."""

from __future__ import annotations

import logging
import threading
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
    """Remembers the places that were read to, in order, until the sinks have settled them.

    The agent's thread notes and advances; `save_settled` may be called from any thread.
    """

    def __init__(
        self, spool: Path, sinks: Sinks, saved: Cursors, *, holds: Callable[[], bool] = lambda: True
    ) -> None:
        """*saved*: what the last agent saved.

        *holds* returns whether the spool is still ours: else its files are another agent's.
        """
        self._holds = holds
        self._spool = spool
        self._sinks = sinks
        self._lock = threading.Lock()
        self._waiting: deque[_Read] = deque()
        self._ends: set[Path] = set()
        """Files that are read to their end, until they are deleted."""
        self._ended: set[Path] = set()
        """Of these the ones that are settled."""
        self._settled = dict(saved)
        self._saved: Cursors = {}
        self.failures = 0
        """Times that the cursor file could not be written; the first is logged."""

    def note(self, ring_id: str, place: Cursor) -> None:
        """Note that a file was read to *place*, and every sink given what was before it."""
        now = mark(self._sinks)
        with self._lock:
            last = self._waiting[-1] if self._waiting else None
            if last and last.ring == ring_id and last.mark == now:
                self._waiting.pop()
            self._waiting.append(_Read(ring_id, place, now))

    def save_settled(self) -> None:
        """Save what is settled by now.

        A sink's thread calls this before it sends more, so that a kill repeats one sending at most.
        """
        with self._lock:
            self._settle()
            self._save()

    def advance(self, drain: Drain) -> None:
        """Save what is settled by now, and delete the files that are settled to their end."""
        ended = drain.ended()
        with self._lock:
            for path in ended:
                if path not in self._ends:
                    self._ends.add(path)
                    self._waiting.append(_Read(path, None, mark(self._sinks)))
            self._settle()
            drain.remove([path for path in ended if path in self._ended])
            self._ends -= self._ended
            self._ended.clear()
            open_rings = drain.places()
            self._settled = {
                ring: place for ring, place in self._settled.items() if ring in open_rings
            }
            self._save()

    def _settle(self) -> None:
        settled = {name: sink.settled for name, sink in self._sinks.items()}
        while self._waiting:
            first = self._waiting[0]
            if any(settled[name] < accepted for name, accepted in first.mark.items()):
                break
            self._waiting.popleft()
            if isinstance(first.ring, Path):
                self._ended.add(first.ring)
            elif first.place:
                self._settled[first.ring] = first.place

    def _save(self) -> None:
        if self._settled == self._saved or not self._holds():
            return
        try:
            save_cursors(self._spool, self._settled)
            self._saved = dict(self._settled)
        except (OSError, StagescopeError) as problem:
            self.failures += 1
            if self.failures == 1:
                why = problem.strerror if isinstance(problem, OSError) else problem
                _log.warning(
                    "how far spool %s is read cannot be saved: %s; an agent that is restarted "
                    "will read some records twice", self._spool, why,
                )  # fmt: skip
