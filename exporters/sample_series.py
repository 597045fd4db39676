"""Which series of samples are shown as metrics now, and which attributes they have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from stagescope.sample_names import SAMPLE_NAMES
from stagescope.samples import LEVEL, Sample, SampleName
from stagescope.semconv import HARDWARE_ID, PROCESS_PID

MAX_SERIES: Final = 2_000
GONE_NS: Final = 60 * 10**9
"""The series of a process that has gone is shown for so long after its last sample."""
STALE_NS: Final = 150 * 10**9
"""A level that was not read for so long is not known any more; the slowest are read each minute."""

_NAMED: Final = {named.name: named for named in SAMPLE_NAMES}


@dataclass(frozen=True, slots=True)
class Series:
    """One series as it is now."""

    named: SampleName
    newest: Sample
    total: float
    """Sum of all its samples: what a counter shows."""
    service: str
    """Of the process that it is of; empty where it is of none, or of none that is served."""

    @property
    def value(self) -> float:
        """What a gauge or a counter shows."""
        return self.newest.value if self.named.kind == LEVEL else self.total

    def attributes(self) -> dict[str, str | int]:
        """Return its attributes among the series of its name, by OpenTelemetry's names."""
        of: dict[str, str | int] = {}
        if self.newest.pid:
            of[PROCESS_PID] = self.newest.pid
        if self.newest.device:
            of[HARDWARE_ID] = self.newest.device
        if self.newest.detail:
            of[self.named.detail or "detail"] = self.newest.detail
        return of


@dataclass(frozen=True, slots=True)
class Shown:
    """The series to show."""

    series: tuple[Series, ...] = ()
    left_out: int = 0
    """Series beyond `MAX_SERIES`, or of names that are not in `SAMPLE_NAMES`."""


def shown(
    latest: Iterable[tuple[Sample, float]], services: Mapping[int, str], now_ns: int
) -> Shown:
    """Choose from the newest sample and the total of each series (`SampleStore.latest`).

    *services* has the service of each served process that lives, by pid.
    """
    current = [
        (sample, total)
        for sample, total in latest
        if _is_current(sample, now_ns, lives=not sample.pid or sample.pid in services)
    ]
    found = [
        Series(_NAMED[sample.name], sample, total, services.get(sample.pid, ""))
        for sample, total in current
        if sample.name in _NAMED
    ][:MAX_SERIES]
    return Shown(tuple(found), len(current) - len(found))


def _is_current(sample: Sample, now_ns: int, *, lives: bool) -> bool:
    age_ns = now_ns - sample.end_ns
    if not lives:
        return age_ns <= GONE_NS
    named = _NAMED.get(sample.name)
    return age_ns <= STALE_NS or (named is not None and named.kind != LEVEL)
