"""Counters of a device, many in one call: `nvmlDeviceGetFieldValues`.

Fields stand here by number: two releases of the bindings give one name two numbers (throttling by
heat was 251 to 253 in one of them, and is 269 to 271 in the driver).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from stagescope.agent.gpu_nvml_buffers import number
from stagescope.agent.gpu_nvml_calls import GONE, NEVER, Calls
from stagescope.agent.gpu_nvml_reading import Moment
from stagescope.agent.gpu_probe import Tier
from stagescope.samples import AMOUNT, LEVEL, Sample

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


class Fields:
    """Several fields of one device; those that it does not know are no longer asked for."""

    def __init__(
        self, calls: Calls, handle: object, device: str, fields: Sequence[Field], tier: Tier
    ) -> None:
        self._calls = calls
        self._handle = handle
        self._device = device
        self._asked = list(fields)
        self._last: dict[int, tuple[int, float]] = {}
        self._answered = False
        self.tier: Tier = tier
        self.call = f"nvmlDeviceGetFieldValues.{tier}"

    @property
    def gives(self) -> Sequence[str]:
        """Names of the fields that it still asks for."""
        return [field.name for field in self._asked]

    def counts(self, name: str, detail: str) -> bool:
        """Tell whether the device has such a field; so it is left to this reading alone."""
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
            if not last_ns or amount < 0:  # the first reading; or the counter began anew
                return []
        return [
            Sample(
                field.name, start_ns, at.now_ns, amount, device=self._device, detail=field.detail
            )
        ]
