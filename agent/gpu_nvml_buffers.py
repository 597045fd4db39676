"""The driver's own buffers of utilisation, power and clocks, by `nvmlDeviceGetSamples`.

The driver samples by itself, several times a second; one call fetches all since the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stagescope.agent.gpu_nvml_calls import Calls
from stagescope.agent.gpu_nvml_reading import Moment
from stagescope.agent.gpu_probe import Tier
from stagescope.samples import Sample

GRAIN_NS: Final = 200_000_000
"""Readings closer than that are averaged: an hour of them has to be kept."""
LONGEST_NS: Final = 2_000_000_000
"""A reading tells of no more than that before it; the driver's own periods are a second at most."""

MEMBERS: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Of nvmlValue_t, in the order of nvmlValueType_t."""


def number(value: Any, kind: int) -> float:
    """Give the number that an nvmlValue_t holds as nvmlValueType_t *kind*."""
    return float(getattr(value, MEMBERS[kind]))


@dataclass(frozen=True, slots=True)
class Kind:
    """One buffer: its number (nvmlSamplingType_t) and what its values are."""

    number: int
    word: str
    name: str
    scale: float
    detail: str = ""


POWER: Final = Kind(0, "power", "hw.power", 1e-3)
GPU: Final = Kind(1, "gpu", "hw.gpu.utilization", 1e-2)
MEMORY: Final = Kind(2, "memory", "model_server.gpu.memory.busy", 1e-2)
SM_CLOCK: Final = Kind(5, "sm_clock", "model_server.gpu.clock", 1e6, "sm")
MEMORY_CLOCK: Final = Kind(6, "memory_clock", "model_server.gpu.clock", 1e6, "memory")


class Buffer:
    """One buffer of one device, from the first reading on."""

    def __init__(
        self, calls: Calls, handle: object, device: str, kind: Kind, tier: Tier = "fast"
    ) -> None:
        self._calls = calls
        self._handle = handle
        self._device = device
        self._kind = kind
        self.tier: Tier = tier
        self.call = f"nvmlDeviceGetSamples.{kind.word}"
        self._last_us = self._end_ns = 0

    @property
    def gives(self) -> Sequence[str]:
        """Its one name."""
        return (self._kind.name,)

    def read(self, at: Moment) -> list[Sample]:
        """Fetch what is new; the first time only find where the buffer stands."""
        kind, found = self._calls(
            "nvmlDeviceGetSamples", self._handle, self._kind.number, self._last_us, as_=self.call
        )
        news = sorted(
            (one.timeStamp, number(one.sampleValue, kind) * self._kind.scale)
            for one in found
            if one.timeStamp > self._last_us
        )
        if not news:
            return []
        begun, self._last_us = self._last_us, news[-1][0]
        if not begun:
            self._end_ns = at.monotonic_ns(self._last_us)
            return []
        return self._averaged((at.monotonic_ns(stamp), value) for stamp, value in news)

    def _averaged(self, news: Iterable[tuple[int, float]]) -> list[Sample]:
        """Give stretches of `GRAIN_NS` and what is left; each reading holds from the one before."""
        samples: list[Sample] = []
        start_ns, weight = self._end_ns, 0.0
        for end_ns, value in news:
            if end_ns <= self._end_ns:
                continue  # the wall clock was set back
            if end_ns - self._end_ns > LONGEST_NS:  # nothing is known of the time between
                samples += self._sample(start_ns, weight)
                start_ns, weight = end_ns - LONGEST_NS, 0.0
                self._end_ns = start_ns
            weight += value * (end_ns - self._end_ns)
            self._end_ns = end_ns
            if end_ns - start_ns >= GRAIN_NS:
                samples += self._sample(start_ns, weight)
                start_ns, weight = end_ns, 0.0
        return samples + self._sample(start_ns, weight)

    def _sample(self, start_ns: int, weight: float) -> list[Sample]:
        lasted_ns = self._end_ns - start_ns
        if not lasted_ns:
            return []
        mean = weight / lasted_ns
        name, detail = self._kind.name, self._kind.detail
        return [Sample(name, start_ns, self._end_ns, mean, device=self._device, detail=detail)]
