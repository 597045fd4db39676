"""Why a device's clocks are held down: edges as events, and time by reason.

Where the driver counts the time of a reason itself (`gpu_nvml_fields.THROTTLE`) its count is the
sample; else the time is estimated from whether the reason held at both ends of the poll.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from stagescope.agent.gpu_nvml_calls import Calls
from stagescope.agent.gpu_nvml_fields import THROTTLE
from stagescope.agent.gpu_nvml_reading import LONGEST_GAP_NS, Moment
from stagescope.agent.gpu_probe import THROTTLE_BEGAN, THROTTLE_ENDED, DeviceEvent, Tier
from stagescope.samples import Sample

REASONS: Final[Mapping[str, int]] = {
    "sw_power_cap": 0x04,
    "hw_slowdown": 0x08,
    "sync_boost": 0x10,
    "sw_thermal_slowdown": 0x20,
    "hw_thermal_slowdown": 0x40,
    "hw_power_brake_slowdown": 0x80,
}
"""Bits of nvmlClocksEventReasons. Idle, and clocks that somebody chose, are no throttling."""


class Clocks:
    """The reasons of one device, by *call* (its name has changed)."""

    tier: Tier = "fast"
    gives: Sequence[str] = (THROTTLE,)

    def __init__(
        self,
        calls: Calls,
        call: str,
        handle: object,
        device: str,
        tell: Callable[[DeviceEvent], None],
        counted: Callable[[str, str], bool],
    ) -> None:
        """*tell* takes events; *counted* tells whether the driver counts a reason's time."""
        self.call = call
        self._calls = calls
        self._handle = handle
        self._device = device
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
