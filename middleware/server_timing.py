"""The `Server-Timing` header for requests of a load run: stages so far, for clients without agent.

Format: https://www.w3.org/TR/server-timing/#the-server-timing-header-field, `dur` in ms.
The header shows the stages to whoever gets the answer, and anybody can name a run in `baggage`.
So by default only those runs are answered that somebody opened in the spool: the load driver, at
the agent or as the user that owns the spool.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from stagescope import settings
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.slots import Slot
from stagescope.middleware.recording.timeline import Timeline
from stagescope.recorder import format as fmt
from stagescope.recorder.spool import OPEN_RUN_SUFFIX, RUNS_FOLDER
from stagescope.stages import STAGES, partition, stage_of

_stages: dict[int, str] = {}
"""By code; a name that has one keeps it."""


_UNKNOWN_NS, _KNOWN_NS = 50_000_000, 1_000_000_000
"""How old a look at the folder may be, for a run that it did not show and for one that it did."""


class _OpenRuns:
    """The runs that are open in one spool, as of a moment ago."""

    def __init__(self, spool: Path) -> None:
        self._folder = spool / RUNS_FOLDER
        self._open: frozenset[bytes] = frozenset()
        self._looked_ns = 0

    def has(self, run: bytes, now_ns: int) -> bool:
        """Return whether *run* is open; reads the folder 20 times a second at most."""
        age_ns = now_ns - self._looked_ns
        if age_ns > _KNOWN_NS or (run not in self._open and age_ns > _UNKNOWN_NS):
            self._looked_ns = now_ns
            self._open = self._look()
        return run in self._open

    def _look(self) -> frozenset[bytes]:
        try:
            names = os.listdir(self._folder)
        except OSError:  # No agent was here, or it is another user's.
            return frozenset()
        return frozenset(
            name.removesuffix(OPEN_RUN_SUFFIX).encode("utf-8", "replace")
            for name in names
            if name.endswith(OPEN_RUN_SUFFIX)
        )


_open_runs: dict[Path, _OpenRuns] = {}
"""By the recorder's spool."""


def answers(timeline: Timeline, now_ns: int) -> bool:
    """Return whether a request that names a run (`timeline.run`) gets the header."""
    mode = settings.SERVER_TIMING.choice()
    if mode in ("off", "all"):
        return mode == "all"
    path = timeline.recorder.path
    if path is None:
        return False
    spool = path.parent
    runs = _open_runs.get(spool) or _open_runs.setdefault(spool, _OpenRuns(spool))
    return runs.has(timeline.run, now_ns)


def header_value(timeline: Timeline, now_ns: int) -> bytes:
    """Return each of the six stages that was seen, and `total`, from the start until now."""
    duration = now_ns - timeline.start_ns
    # What other processes wrote, too: in a server of several, that is where the work is done.
    slots = (timeline.slot, *(timeline.chain or ()), *(timeline.lent or ()))
    entries = [entry for slot in slots for entry in _entries(slot, timeline.start_ns)]
    entries.sort(key=lambda entry: entry[0])
    intervals = [(start, end - timeline.start_ns if end else duration) for start, end, _ in entries]
    charged, _ = partition(intervals, duration)
    sums = dict.fromkeys(STAGES, 0)
    for (_, _, code), spent in zip(entries, charged, strict=True):
        stage = _stage(code & ~fmt.CODE_FAILED, timeline.recorder)
        if stage in sums:
            sums[stage] += spent
    parts = [f"{stage};dur={spent / 1e6:.6f}" for stage, spent in sums.items() if spent]
    return ", ".join([*parts, f"total;dur={duration / 1e6:.6f}"]).encode()


def _stage(code: int, recorder: Recorder) -> str:
    """Return the stage of *code*, also of one that another process put into our table of names."""
    if code not in _stages:
        _stages.update((known, stage_of(name)) for name, known in list(CODES.items()))
    return _stages[code] if code in _stages else stage_of(recorder.read_name(code))


def _entries(slot: Slot, since_ns: int) -> Iterator[tuple[int, int, int]]:
    """Yield start since *since_ns*, end (absolute) and code of the stages in *slot*."""
    times = slot.times.tolist()
    for index, code in enumerate(slot.codes.tolist()):
        if 0 < code < fmt.CODE_SPECIAL:
            yield times[index] - since_ns, times[index + fmt.ENTRIES_PER_SLOT], code
