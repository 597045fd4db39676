"""What is read of one device by one NVML call, and what an error of that call means for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

from stagescope.agent.gpu.nvml_calls import GONE, NEVER, NO_PERMISSION, NOTHING_NOW, Calls
from stagescope.agent.gpu.probe import Tier
from stagescope.samples import Sample

STRIKES: Final = 3
"""Errors in a row that nobody has a word for, after which a reading rests."""
REST_S: Final = 60.0
LONGEST_GAP_NS: Final = 200_000_000_000
"""Two readings further apart say nothing about the time between."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Now, on both clocks: the driver stamps with microseconds since 1970."""

    now_ns: int
    epoch_ns: int

    def monotonic_ns(self, epoch_us: int) -> int:
        """Return the monotonic time of a stamp of the driver's; never later than now."""
        return min(self.now_ns, epoch_us * 1000 - self.epoch_ns + self.now_ns)


class Reading(Protocol):
    """Reads something of one device."""

    @property
    def call(self) -> str:
        """The name under which its call is timed."""
        ...

    @property
    def tier(self) -> Tier:
        """How often."""
        ...

    def read(self, at: Moment) -> list[Sample]:
        """Read it. Raises NVMLError."""
        ...


class DeviceReading:
    """What the readings of one device by calls of NVML have in common."""

    def __init__(self, calls: Calls, handle: object, device: str) -> None:
        self._calls = calls
        self._handle = handle
        self._device = device


class Either:
    """The first of several readings that the driver knows: newer calls before older ones."""

    def __init__(self, calls: Calls, *readings: Reading) -> None:
        self._errors = calls.nvml.NVMLError
        self._left = list(readings)
        self.tier: Tier = readings[0].tier

    @property
    def call(self) -> str:
        """The call in use."""
        return self._left[0].call

    def read(self, at: Moment) -> list[Sample]:
        """Read with the call in use, or with the next where the driver does not know it."""
        while len(self._left) > 1:
            try:
                return self._left[0].read(at)
            except self._errors as error:
                if error.value not in NEVER:
                    raise
                del self._left[0]
        return self._left[0].read(at)


@dataclass(frozen=True, slots=True)
class Value:
    """One number of one moment, by one call."""

    calls: Calls
    call: str
    ask: Callable[[], float]
    name: str
    device: str
    tier: Tier = "fast"
    scale: float = 1.0
    detail: str = ""

    def read(self, at: Moment) -> list[Sample]:
        """Ask for it."""
        value = self.ask() * self.scale
        return [
            Sample(self.name, at.now_ns, at.now_ns, value, device=self.device, detail=self.detail)
        ]


class DeviceGone(Exception):
    """The device, or the driver, no longer answers; the driver's words."""


class Guarded:
    """A reading that is switched off alone where the driver refuses it."""

    def __init__(self, reading: Reading, calls: Calls, device: str) -> None:
        self.reading = reading
        self.off = False
        self._calls = calls
        self._device = device
        self._errors = calls.nvml.NVMLError
        self._turn = self._strikes = self._rests_until_ns = 0

    def read(self, at: Moment) -> list[Sample]:
        """Read, where it is its turn. Raises DeviceGone."""
        self._turn += 1
        rests = at.now_ns < self._rests_until_ns
        if self.off or rests or self._turn % self._calls.rarer(self.reading.call):
            return []
        try:
            samples = self.reading.read(at)
        except self._errors as error:
            self._failed(error, at)
            return []
        self._strikes = 0
        return samples

    def _failed(self, error: Any, at: Moment) -> None:
        if error.value in GONE:
            raise DeviceGone(str(error)) from error
        if error.value in NEVER:
            self.off = True
            if error.value == NO_PERMISSION:
                self._calls.say(f"no permission for {self.reading.call}, so it is left out")
        elif error.value not in NOTHING_NOW:
            self._strike(error, at)

    def _strike(self, error: Any, at: Moment) -> None:
        self._strikes += 1
        self._calls.say(
            f"{self.reading.call} of {self._device} fails: {error}; what it reads is missing where "
            f"it does, and after {STRIKES} in a row it rests for {REST_S:g} s",
            about=f"{self.reading.call} {error.value}",
        )
        if self._strikes >= STRIKES:
            self._strikes = 0
            self._rests_until_ns = at.now_ns + int(REST_S * 1e9)


USAGE: Final = "hw.gpu.memory.usage"
RESERVED: Final = "model_server.gpu.memory.reserved"


class Memory(DeviceReading):
    """In use, and reserved."""

    tier: Tier = "fast"
    call = "nvmlDeviceGetMemoryInfo_v2"

    def read(self, at: Moment) -> list[Sample]:
        """Read both."""
        version = self._calls.nvml.nvmlMemory_v2
        memory = self._calls("nvmlDeviceGetMemoryInfo", self._handle, version, as_=self.call)
        return [
            Sample(USAGE, at.now_ns, at.now_ns, float(memory.used), device=self._device),
            Sample(RESERVED, at.now_ns, at.now_ns, float(memory.reserved), device=self._device),
        ]
