"""Context switches of a process: the sum over its threads, each of which has a file of its own.

`/proc/PID/status` tells those of the main thread alone, which is what most tools show.
"""

from __future__ import annotations

import os
import re

from stagescope.agent.host.files import read
from stagescope.agent.host.growth import Counter

MOST_THREADS = 256
"""About 3 ms; of a process with more threads nothing is told."""

VOLUNTARY = Counter("process.context_switches", "voluntary")
INVOLUNTARY = Counter("process.context_switches", "involuntary")
_COUNTS = re.compile(
    rb"^voluntary_ctxt_switches:\s+(\d{1,19})\nnonvoluntary_ctxt_switches:\s+(\d{1,19})$",
    re.MULTILINE,
)


class Switches:
    """Sums that only grow, although threads come and go and take their counts with them."""

    def __init__(self, tasks: str) -> None:
        """*tasks* is the folder with a folder for each thread."""
        self._tasks = tasks
        self._last: dict[str, tuple[int, int]] = {}
        self._sums = 0, 0

    def read(self) -> dict[Counter, int]:
        """Read all threads; what one did between its last reading and its end is not seen."""
        try:
            threads = os.listdir(self._tasks)
        except OSError:
            return {}
        if len(threads) > MOST_THREADS:
            return {}
        now = {thread: found for thread in threads if (found := self._of(thread))}
        for thread, (voluntary, involuntary) in now.items():
            before = self._last.get(thread, (0, 0))
            if before[0] > voluntary or before[1] > involuntary:
                before = 0, 0  # another thread by the same number
            self._sums = (
                self._sums[0] + voluntary - before[0],
                self._sums[1] + involuntary - before[1],
            )
        self._last = now
        return {VOLUNTARY: self._sums[0], INVOLUNTARY: self._sums[1]} if now else {}

    def _of(self, thread: str) -> tuple[int, int] | None:
        found = _COUNTS.search(read(f"{self._tasks}/{thread}/status") or b"")
        return (int(found[1]), int(found[2])) if found else None
