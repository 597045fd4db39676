"""Counters of a device, many in one call: `nvmlDeviceGetFieldValues`.

Fields stand here by number: two releases of the bindings give one name two numbers (throttling by
heat was 251 to 253 in one of them, and is 269 to 271 in the driver).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stagescope.agent.gpu.nvml_calls import GONE, NEVER, Calls
from stagescope.agent.gpu.nvml_readings import LONGEST_GAP_NS, DeviceReading, Moment
from stagescope.agent.gpu.probe import THROTTLE_BEGAN, THROTTLE_ENDED, DeviceEvent, Tier
from stagescope.samples import AMOUNT, LEVEL, Sample

# The driver's own buffers of utilisation, power and clocks, by `nvmlDeviceGetSamples`.
#
# The driver samples by itself, several times a second; one call fetches all since the last one.


GRAIN_NS: Final = 200_000_000
"""Readings closer than that are averaged: an hour of them has to be kept."""
LONGEST_NS: Final = 2_000_000_000
"""A reading covers no more than that before it; the driver's own periods are a second at most."""

MEMBERS: Final = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
"""Of nvmlValue_t, in the order of nvmlValueType_t."""


def number(value: Any, kind: int) -> float:
    """Return the number that an nvmlValue_t holds as nvmlValueType_t *kind*."""
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


class Buffer(DeviceReading):
    """One buffer of one device, from the first reading on."""

    def __init__(
        self, calls: Calls, handle: object, device: str, kind: Kind, tier: Tier = "fast"
    ) -> None:
        super().__init__(calls, handle, device)
        self._kind = kind
        self.tier: Tier = tier
        self.call = f"nvmlDeviceGetSamples.{kind.word}"
        self._last_us = self._end_ns = 0

    def read(self, at: Moment) -> list[Sample]:
        """Fetch what is new; the first time only find the end of the buffer."""
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
        """Return stretches of `GRAIN_NS` and what is left; each reading holds from the one before."""
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


ALL_LINKS: Final = 0xFFFFFFFF
THROTTLE: Final = "model_server.gpu.throttle.time"


@dataclass(frozen=True, slots=True)
class Field:
    """One field: its number, and what its value is."""

    id: int
    name: str
    kind: str
    """`LEVEL`, or `AMOUNT` where the driver counts up and the growth is the sample."""
    scale: float = 1.0
    detail: str = ""
    scope: int = 0


POWER_INSTANT: Final = Field(186, "hw.power", LEVEL, 1e-3)
FAST: Final = (
    Field(83, "hw.energy", AMOUNT, 1e-3),
    Field(82, "hw.temperature", LEVEL, 1.0, "memory"),
    Field(197, "hw.gpu.io", AMOUNT, 1.0, "transmit"),
    Field(198, "hw.gpu.io", AMOUNT, 1.0, "receive"),
    Field(138, "model_server.gpu.nvlink.io", AMOUNT, 1024.0, "transmit", ALL_LINKS),
    Field(139, "model_server.gpu.nvlink.io", AMOUNT, 1024.0, "receive", ALL_LINKS),
    Field(74, THROTTLE, AMOUNT, 1e-9, "sw_power_cap"),
    Field(76, THROTTLE, AMOUNT, 1e-9, "sync_boost"),
    Field(269, THROTTLE, AMOUNT, 1e-9, "sw_thermal_slowdown"),
    Field(270, THROTTLE, AMOUNT, 1e-9, "hw_thermal_slowdown"),
    Field(271, THROTTLE, AMOUNT, 1e-9, "hw_power_brake_slowdown"),
)
SLOW: Final = (
    Field(3, "hw.errors", AMOUNT, 1.0, "corrected"),
    Field(4, "hw.errors", AMOUNT, 1.0, "uncorrected"),
)


class Fields(DeviceReading):
    """Several fields of one device; those that it does not know are no longer asked for."""

    def __init__(
        self, calls: Calls, handle: object, device: str, fields: Sequence[Field], tier: Tier
    ) -> None:
        super().__init__(calls, handle, device)
        self._asked = list(fields)
        self._last: dict[int, tuple[int, float]] = {}
        self._answered = False
        self.tier: Tier = tier
        self.call = f"nvmlDeviceGetFieldValues.{tier}"

    def counts(self, name: str, detail: str) -> bool:
        """Return whether the device has such a field; so it is left to this reading alone."""
        return self._answered and (name, detail) in {(one.name, one.detail) for one in self._asked}

    def read(self, at: Moment) -> list[Sample]:
        """Read all fields at once."""
        wanted = [(field.id, field.scope) for field in self._asked]
        if not wanted:
            return []
        values = self._calls("nvmlDeviceGetFieldValues", self._handle, wanted, as_=self.call)
        self._answered = True
        samples: list[Sample] = []
        for field, value in zip(tuple(self._asked), values, strict=True):
            samples += self._sample(field, value, at)
        return samples

    def _sample(self, field: Field, value: Any, at: Moment) -> list[Sample]:
        """Each value has an outcome of its own."""
        if value.nvmlReturn in GONE:
            raise self._calls.nvml.NVMLError(value.nvmlReturn)
        if value.nvmlReturn in NEVER:
            self._asked.remove(field)
        if value.nvmlReturn:
            return []
        now = number(value.value, value.valueType) * field.scale
        last_ns, last = self._last.get(field.id, (0, 0.0))
        self._last[field.id] = at.now_ns, now
        start_ns, amount = at.now_ns, now
        if field.kind == AMOUNT:
            start_ns, amount = last_ns, now - last
            if not last_ns or amount < 0:  # the first reading; or the counter was reset
                return []
        return [
            Sample(
                field.name, start_ns, at.now_ns, amount, device=self._device, detail=field.detail
            )
        ]


# Why a device's clocks are held down: edges as events, and time by reason.
#
# Where the driver counts the time of a reason itself (`gpu_nvml_fields.THROTTLE`) its count is the
# sample; else the time is estimated from whether the reason held at both ends of the poll.


REASONS: Final[Mapping[str, int]] = {
    "sw_power_cap": 0x04,
    "hw_slowdown": 0x08,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
}
"""Bits of nvmlClocksEventReasons. Idle, and clocks that somebody chose, are no throttling."""


class Clocks(DeviceReading):
    """The reasons of one device, by *call* (its name has changed)."""

    tier: Tier = "fast"

    def __init__(
        self,
        calls: Calls,
        call: str,
        handle: object,
        device: str,
        tell: Callable[[DeviceEvent], None],
        counted: Callable[[str, str], bool],
    ) -> None:
        """*tell* takes events; *counted* returns whether the driver counts a reason's time."""
        self.call = call
        super().__init__(calls, handle, device)
        self._tell = tell
        self._counted = counted
        self._last_ns = self._last = 0

    def read(self, at: Moment) -> list[Sample]:
        """Ask which reasons hold now."""
        now = int(self._calls(self.call, self._handle))
        before, last_ns = self._last, self._last_ns
        self._last, self._last_ns = now, at.now_ns
        for reason, bit in REASONS.items():
            if (before ^ now) & bit:
                kind = THROTTLE_BEGAN if now & bit else THROTTLE_ENDED
                self._tell(DeviceEvent(at.now_ns, self._device, kind, reason))
        if not last_ns or at.now_ns - last_ns > LONGEST_GAP_NS:
            return []
        return [
            Sample(
                THROTTLE, last_ns, at.now_ns,
                (at.now_ns - last_ns) / 1e9 * (bool(before & bit) + bool(now & bit)) / 2,
                device=self._device, detail=reason,
            )
            for reason, bit in REASONS.items()
            if not self._counted(THROTTLE, reason)
        ]  # fmt: skip
