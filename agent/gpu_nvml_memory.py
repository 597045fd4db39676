"""Memory of a device, by the version of the call that tells the driver's own reserve apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from stagescope.agent.gpu_nvml_calls import Calls
from stagescope.agent.gpu_nvml_reading import Moment
from stagescope.agent.gpu_probe import Tier
from stagescope.samples import Sample

USAGE: Final = "hw.gpu.memory.usage"
RESERVED: Final = "model_server.gpu.memory.reserved"


class Memory:
    """In use, and reserved."""

    tier: Tier = "fast"
    call = "nvmlDeviceGetMemoryInfo_v2"
    gives: Sequence[str] = (USAGE, RESERVED)

    def __init__(self, calls: Calls, handle: object, device: str) -> None:
        self._calls = calls
        self._handle = handle
        self._device = device

    def read(self, at: Moment) -> list[Sample]:
        """Read both."""
        version = self._calls.nvml.nvmlMemory_v2
        memory = self._calls("nvmlDeviceGetMemoryInfo", self._handle, version, as_=self.call)
        return [
            Sample(USAGE, at.now_ns, at.now_ns, float(memory.used), device=self._device),
            Sample(RESERVED, at.now_ns, at.now_ns, float(memory.reserved), device=self._device),
        ]
