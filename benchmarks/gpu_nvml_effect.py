"""What the GPU sampler costs a process that computes: its batches with the sampler and without.

The sampler is ours as it runs in an agent, in this process; the batches are another process's
(gpu_busy.py), as a server's would be. Turns alternate in an order that rotates, and each is
compared with the turn of the same round in which nobody sampled.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median, quantiles
from typing import Any, Final

from gpu_busy import busy

from stagescope.agent.gpu.nvml import NvmlProbe
from stagescope.agent.gpu.probe import Tier
from stagescope.agent.gpu.sampler import GpuSampler
from stagescope.agent.store.telemetry import TelemetryBuffer
from stagescope.samples import Sample
from stagescope.testing import wait_until

PERIODS: Final = {"off": 0.0, "1 Hz": 1.0, "10 Hz": 0.1}
FIRST_POLL_S: Final = 30.0

Figures = dict[str, Any]
Interval = tuple[int, int]
"""Begin and length, ns: of a batch, of a poll."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A while in which it was sampled, or not."""

    variant: str
    begun_ns: int
    ended_ns: int

    def of(self, stretches: Sequence[Interval]) -> list[Interval]:
        """Return those that began in it."""
        return [one for one in stretches if self.begun_ns <= one[0] < self.ended_ns]


class NotedProbe(NvmlProbe):
    """Notes when it was polled."""

    def __init__(self, polls: list[Interval]) -> None:
        super().__init__()
        self._polls = polls

    def poll(self, tier: Tier) -> list[Sample]:
        """Poll, and note when and how long."""
        begun = time.monotonic_ns()
        try:
            return super().poll(tier)
        finally:
            self._polls.append((begun, time.monotonic_ns() - begun))


def in_turns(device: str, rounds: int, turn_s: float) -> Figures:
    """Return, by how often it was sampled, what batches took. Raises AssertionError without NVML."""
    polls: list[Interval] = []
    with busy(device) as child:
        turns = [_turn(variant, polls, turn_s) for variant in _order(rounds)]
        batches: list[Interval] = child.end()["batches"]
    off = [turn for turn in turns if turn.variant == "off"]
    return {
        variant: _figures([turn for turn in turns if turn.variant == variant], off, polls, batches)
        for variant in PERIODS
    }


def _order(rounds: int) -> Iterator[str]:
    order = list(PERIODS)
    for number in range(rounds):
        at = number % len(order)
        yield from order[at:] + order[:at]


def _turn(variant: str, polls: list[Interval], turn_s: float) -> Turn:
    """Sample for a while, or not."""
    if not PERIODS[variant]:
        begun = time.monotonic_ns()
        time.sleep(turn_s)
        return Turn(variant, begun, time.monotonic_ns())
    before = len(polls)
    sampler = GpuSampler(partial(NotedProbe, polls), TelemetryBuffer(), fast_s=PERIODS[variant])
    sampler.collect()
    try:
        # The first polls find out what there is, once in the life of an agent.
        wait_until(lambda: len(polls) >= before + 2, FIRST_POLL_S)
        begun = time.monotonic_ns()
        time.sleep(turn_s)
        sampler.collect()  # raises what its threads failed of
        return Turn(variant, begun, time.monotonic_ns())
    finally:
        sampler.close()


def _figures(
    turns: Sequence[Turn],
    off: Sequence[Turn],
    polls: Sequence[Interval],
    batches: Sequence[Interval],
) -> Figures:
    whole = [length for turn in turns for _, length in turn.of(batches)]
    return {
        **_spread(whole),
        **_changes([(turn.of(batches), bare.of(batches))
                    for turn, bare in zip(turns, off, strict=True)]),
        **_beside_polls([poll for turn in turns for poll in turn.of(polls)], batches),
    }  # fmt: skip


def _spread(lengths_ns: Sequence[int]) -> Figures:
    if len(lengths_ns) < 2:
        return {"batches": len(lengths_ns)}
    return {
        "batches": len(lengths_ns),
        "p50_ms": median(lengths_ns) / 1e6,
        "p99_ms": _p99(lengths_ns) / 1e6,
        "longest_ms": max(lengths_ns) / 1e6,
    }


def _changes(rounds: Sequence[tuple[Sequence[Interval], Sequence[Interval]]]) -> Figures:
    """Compare each turn with the one of its round without a sampler; give medians."""
    whole = [
        ([length for _, length in mine], [length for _, length in bare])
        for mine, bare in rounds
        if min(len(mine), len(bare)) > 1
    ]
    if not whole:
        return {}
    return {
        "p50_change": median([median(mine) / median(bare) - 1 for mine, bare in whole]),
        "p99_change": median([_p99(mine) / _p99(bare) - 1 for mine, bare in whole]),
    }


def _beside_polls(polls: Sequence[Interval], batches: Sequence[Interval]) -> Figures:
    """Return the batches that were under way while the driver was asked."""
    if not polls:
        return {}
    lengths = [length for _, length in polls]
    during = [
        took
        for at, took in batches
        if any(at < begun + length and at + took > begun for begun, length in polls)
    ]
    return {
        "polls": len(polls),
        "poll_ms": median(lengths) / 1e6,
        "longest_poll_ms": max(lengths) / 1e6,
        "during_polls": _spread(during),
    }


def _p99(lengths_ns: Sequence[int]) -> float:
    return quantiles(lengths_ns, n=100)[98]
