"""Hardware counters of Hopper and later (GPM): two readings about a second apart make one sample.

The same counters serve DCGM, so they are left alone where its exporter runs (docs/gpu.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

from stagescope.agent.gpu.nvml_calls import Calls
from stagescope.agent.gpu.nvml_readings import DeviceReading, Moment
from stagescope.agent.gpu.probe import Tier
from stagescope.samples import Sample

MIB: Final = float(1 << 20)


@dataclass(frozen=True, slots=True)
class Metric:
    """One counter: its number (nvmlGpmMetricId_t), and what its value is."""

    id: int
    name: str
    scale: float = 1e-2
    detail: str = ""
    rate: bool = False
    """True: the value is per second, and the sample how much there was."""


SHARES: Final = (
    Metric(2, "model_server.gpu.sm.active"),
    Metric(3, "model_server.gpu.sm.occupancy"),
    Metric(5, "model_server.gpu.tensor.active"),
    Metric(10, "model_server.gpu.dram.active"),
)
BUSY: Final = Metric(1, "hw.gpu.utilization")
"""For a part of a device, which has no utilisation of the driver's."""
TRAFFIC: Final = (
    Metric(20, "hw.gpu.io", MIB, "transmit", rate=True),
    Metric(21, "hw.gpu.io", MIB, "receive", rate=True),
    Metric(60, "model_server.gpu.nvlink.io", MIB, "receive", rate=True),
    Metric(61, "model_server.gpu.nvlink.io", MIB, "transmit", rate=True),
)


class Gpm(DeviceReading):
    """The counters of one device, or of one MIG instance of it."""

    tier: Tier = "fast"

    def __init__(
        self,
        calls: Calls,
        handle: object,
        device: str,
        *,
        instance: int | None = None,
        allowed: Callable[[], bool],
        known: Callable[[str, str], bool] = lambda name, detail: False,
    ) -> None:
        """*handle* is the whole device's; *known* returns whether another reading has it exactly."""
        super().__init__(calls, handle, device)
        self._instance = instance
        self._allowed = allowed
        self._known = known
        self._supported: bool | None = None
        self._old: tuple[Any, int] | None = None
        self._spare: list[Any] = []

    @property
    def call(self) -> str:
        """The slower of the two calls that a reading takes."""
        return max("nvmlGpmSampleGet", "nvmlGpmMetricsGet", key=self._calls.rarer)

    def read(self, at: Moment) -> list[Sample]:
        """Take a reading, and return what there was since the one before."""
        if not self._allowed() or not self._is_supported():
            self._forget()
            return []
        before, self._old = self._old, (self._take(), at.now_ns)
        if before is None:
            return []
        try:
            return self._between(*before, *self._old)
        finally:
            self._spare.append(before[0])

    def close(self) -> None:
        """Free the memory of both readings."""
        self._forget()
        while self._spare:
            with suppress(self._calls.nvml.NVMLError):
                self._calls("nvmlGpmSampleFree", self._spare.pop())

    def _forget(self) -> None:
        if self._old is not None:
            self._spare.append(self._old[0])
            self._old = None

    def _is_supported(self) -> bool:
        if self._supported is None:
            answer = self._calls("nvmlGpmQueryDeviceSupport", self._handle)
            self._supported = bool(answer.isSupportedDevice)
        return self._supported

    def _take(self) -> Any:
        sample = self._spare.pop() if self._spare else self._calls("nvmlGpmSampleAlloc")
        try:
            if self._instance is None:
                self._calls("nvmlGpmSampleGet", self._handle, sample)
            else:
                self._calls(
                    "nvmlGpmMigSampleGet",
                    self._handle,
                    self._instance,
                    sample,
                    as_="nvmlGpmSampleGet",
                )
        except self._calls.nvml.NVMLError:
            self._spare.append(sample)
            raise
        return sample

    def _metrics(self) -> list[Metric]:
        if self._instance is not None:
            return [BUSY, *SHARES]
        return [*SHARES, *(one for one in TRAFFIC if not self._known(one.name, one.detail))]

    def _between(self, old: Any, old_ns: int, new: Any, new_ns: int) -> list[Sample]:
        nvml, metrics = self._calls.nvml, self._metrics()
        asked = nvml.c_nvmlGpmMetricsGet_t()
        asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
        asked.numMetrics = len(metrics)
        asked.sample1, asked.sample2 = old, new
        for slot, metric in zip(asked.metrics, metrics, strict=False):
            slot.metricId = metric.id
        self._calls("nvmlGpmMetricsGet", asked)
        samples = []
        for slot, metric in zip(asked.metrics, metrics, strict=False):
            if slot.nvmlReturn or not math.isfinite(slot.value):
                continue
            value = slot.value * metric.scale * ((new_ns - old_ns) / 1e9 if metric.rate else 1.0)
            samples.append(
                Sample(
                    metric.name, old_ns, new_ns, value, device=self._device, detail=metric.detail
                )
            )
        return samples
