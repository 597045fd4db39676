"""The `Server-Timing` header for requests of a load run: stages so far, for clients without agent.

Format: https://www.w3.org/TR/server-timing/#the-server-timing-header-field, `dur` in ms.
"""

from __future__ import annotations

from stagescope import recorder_format as fmt
from stagescope.middleware.names import CODES
from stagescope.middleware.timeline import Timeline
from stagescope.stages import STAGES, partition, stage_of

_STAGE_BY_CODE = {code: stage_of(name) for name, code in CODES.items()}


def header_value(timeline: Timeline, now_ns: int) -> bytes:
    """Give each of the six stages that was seen, and `total`, from the start until now."""
    duration = now_ns - timeline.start_ns
    words = timeline.slot.cells.tolist()
    entries = [
        (opened, closed)
        for opened, closed in zip(words[::2], words[1::2], strict=True)
        if 0 < opened & fmt.CODE_MASK < fmt.CODE_MEMBER
    ]
    entries.sort(key=lambda entry: entry[0] >> fmt.CODE_BITS)
    times = [
        (opened >> fmt.CODE_BITS, closed >> fmt.CODE_BITS if closed else duration)
        for opened, closed in entries
    ]
    charged, _ = partition(times, duration)
    sums = dict.fromkeys(STAGES, 0)
    for (opened, _), spent in zip(entries, charged, strict=True):
        stage = _STAGE_BY_CODE.get(opened & fmt.CODE_MASK, "")
        if stage in sums:
            sums[stage] += spent
    parts = [f"{stage};dur={spent / 1e6:.6f}" for stage, spent in sums.items() if spent]
    return ", ".join([*parts, f"total;dur={duration / 1e6:.6f}"]).encode()
