"""Saves how far the spool is read, no further than what every sink has settled."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from stagescope.agent.drain import Cursors, Drain, save_cursors
from stagescope.agent.sinks import Mark, Sinks, mark, settled
from stagescope.errors import StagescopeError

_log = logging.getLogger("stagescope")


@dataclass(frozen=True, slots=True)
class _Taken:
    """Places read up to, what the sinks had accepted then, and the files that were at their end."""

    places: Cursors
    mark: Mark
    ended: list[Path]


class Checkpoint:
    """At most one checkpoint waits for the sinks; when it is settled it is saved."""

    def __init__(
        self, spool: Path, drain: Drain, sinks: Sinks, *, holds: Callable[[], bool] = lambda: True
    ) -> None:
        """*holds* tells whether the spool is still ours: else its files are another agent's."""
        self._holds = holds
        self._spool = spool
        self._drain = drain
        self._sinks = sinks
        self._waiting: _Taken | None = None
        self._saved: Cursors = {}
        self.failures = 0
        """Times that the cursor file could not be written; the first is logged."""

    def advance(self) -> None:
        """Save the waiting checkpoint if it is settled; take a new one where none waits."""
        if self._waiting is None:
            self._waiting = _Taken(self._drain.places(), mark(self._sinks), self._drain.ended())
        if settled(self._sinks, self._waiting.mark):
            done, self._waiting = self._waiting, None
            self._drain.bury(done.ended)
            self._save(done.places)

    def _save(self, places: Cursors) -> None:
        if places == self._saved or not self._holds():
            return
        try:
            save_cursors(self._spool, places)
            self._saved = places
        except (OSError, StagescopeError) as problem:
            self.failures += 1
            if self.failures == 1:
                why = problem.strerror if isinstance(problem, OSError) else problem
                _log.warning(
                    "how far spool %s is read cannot be saved: %s; an agent that is restarted "
                    "will read some records twice", self._spool, why,
                )  # fmt: skip
