"""How far a run is, for who watches it; needs the standard library alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """The run so far."""

    sent: int
    planned: int
    in_flight: int
    failed: int
    elapsed_s: float
    whole_s: float
    rate_per_s: float
    """Requests sent per second so far."""
    p50_ms: float
    """Of the latest 2,000 finished requests, from `intended`."""


@dataclass(frozen=True, slots=True)
class Watch:
    """A callback for the run's `Progress`, called every `every_s` seconds."""

    look: Callable[[Progress], None]
    every_s: float
