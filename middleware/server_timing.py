"""The `Server-Timing` header for requests of a load run: stages so far, for clients without agent.

Format: https://www.w3.org/TR/server-timing/#the-server-timing-header-field, `dur` in ms.
The header shows the stages to whoever gets the answer, and anybody can name a run in `baggage`.
So by default only those runs are answered that are open here (`recording/open_runs.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from stagescope import settings
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.slots import Slot
from stagescope.middleware.recording.timeline import Timeline
from stagescope.recorder import format as fmt
from stagescope.stages import STAGES, partition, stage_of

_stages: dict[int, str] = {}
"""By code; a name that has one keeps it."""


def answers(timeline: Timeline) -> bool:
    """Return whether a request that names a run (`timeline.run`) gets the header."""
    mode = settings.SERVER_TIMING.choice()
    return timeline.watched if mode not in ("off", "all") else mode == "all"


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
