"""Which load runs are open on this host, so that only their requests are looked at more closely.

Anybody can name a run in `baggage`. Open is one that the load driver opened in the spool: at the
agent, or as the user that owns the spool.
"""

from __future__ import annotations

import os
from pathlib import Path

from stagescope.recorder.spool import OPEN_RUN_SUFFIX, RUNS_FOLDER

_UNKNOWN_NS, _KNOWN_NS = 50_000_000, 1_000_000_000
"""How old a look at the folder may be, for a run that it did not show and for one that it did."""


class OpenRuns:
    """The runs that are open in one spool, as of a moment ago; none where there is no spool."""

    def __init__(self, spool: Path | None) -> None:
        self._folder = spool and spool / RUNS_FOLDER
        self._open: frozenset[bytes] = frozenset()
        self._looked_ns = 0

    def has(self, run: bytes, now_ns: int) -> bool:
        """Return whether *run* is open; reads the folder 20 times a second at most."""
        age_ns = now_ns - self._looked_ns
        if age_ns > _KNOWN_NS or (run not in self._open and age_ns > _UNKNOWN_NS):
            self._open = self._look()
            self._looked_ns = now_ns  # After it, or another thread would take the old look for new.
        return run in self._open

    def _look(self) -> frozenset[bytes]:
        if self._folder is None:
            return frozenset()
        try:
            names = os.listdir(self._folder)
        except OSError:  # No agent was here, or it is another user's.
            return frozenset()
        return frozenset(
            name.removesuffix(OPEN_RUN_SUFFIX).encode("utf-8", "replace")
            for name in names
            if name.endswith(OPEN_RUN_SUFFIX)
        )
