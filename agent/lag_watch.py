"""Notices event loops that lag, by the figures that their processes keep in the recorder file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from stagescope.agent.notices import LOOP_LAG, Notice, Notices
from stagescope.records import Process

Waits = Mapping[str, int]
"""`recorder_format.WAITS` of one process."""

STILL_S: Final = 0.4
"""A loop that ticks ten times a second and has not for this long stands still now."""
LAG_SHARE: Final = 0.25
"""Of the time since the last look: a loop that was late by so much in all lags."""


@dataclass(slots=True)
class _Seen:
    ticks: int
    lag_ns: int
    ticked_ns: int
    """When the ticks were last seen to have grown."""
    told: bool = False
    """That it stands still was told, and it has not ticked since."""


class LagWatch:
    """Looks at the loops of all live processes; the best time to look closer is while one lags."""

    def __init__(
        self, notices: Notices, waits: Callable[[], Sequence[tuple[Process, Waits]]]
    ) -> None:
        self._notices = notices
        self._waits = waits
        self._seen: dict[str, _Seen] = {}

    def look(self, now_ns: int) -> None:
        """Compare with the last look."""
        alive = self._waits()
        for process, waits in alive:
            self._compare(process, waits, now_ns)
        for ring_id in self._seen.keys() - {process.ring_id for process, _ in alive}:
            del self._seen[ring_id]

    def _compare(self, process: Process, waits: Waits, now_ns: int) -> None:
        ticks, lag_ns = waits["loop_ticks"], waits["loop_lag_ns"]
        seen = self._seen.get(process.ring_id)
        if seen is None or not ticks:  # a process without an event loop has no ticks
            self._seen[process.ring_id] = _Seen(ticks, lag_ns, now_ns)
            return
        if ticks == seen.ticks:
            self._stands_still(process, seen, now_ns)
            return
        late_ns = lag_ns - seen.lag_ns
        # Where its standing still was told, the lag that it then owns up to is no news.
        if not seen.told and late_ns > LAG_SHARE * (now_ns - seen.ticked_ns):
            self._tell(process, now_ns,
                       f"was late by {late_ns / 1e6:.0f} ms in {ticks - seen.ticks} ticks within "
                       f"{(now_ns - seen.ticked_ns) / 1e6:.0f} ms")  # fmt: skip
        self._seen[process.ring_id] = _Seen(ticks, lag_ns, now_ns)

    def _stands_still(self, process: Process, seen: _Seen, now_ns: int) -> None:
        still_ns = now_ns - seen.ticked_ns
        if still_ns >= STILL_S * 1e9 and not seen.told:
            seen.told = True
            self._tell(process, now_ns, f"has stood still for {still_ns / 1e6:.0f} ms")

    def _tell(self, process: Process, now_ns: int, what: str) -> None:
        sentence = f"the event loop of {process.service} (pid {process.pid}) {what}"
        self._notices.put(Notice(LOOP_LAG, process.pid, "", now_ns, sentence))
