"""What is read of one NVIDIA device, and of one MIG instance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from stagescope.agent import gpu_nvml_buffers as buffers
from stagescope.agent import gpu_nvml_processes as processes
from stagescope.agent.gpu_nvml_calls import Calls
from stagescope.agent.gpu_nvml_clocks import Clocks
from stagescope.agent.gpu_nvml_fields import FAST, POWER_INSTANT, SLOW, Fields
from stagescope.agent.gpu_nvml_gpm import Gpm
from stagescope.agent.gpu_nvml_memory import USAGE, Memory
from stagescope.agent.gpu_nvml_reading import Either, Guarded, Reading, Value
from stagescope.agent.gpu_probe import Device, DeviceEvent


@dataclass(frozen=True, slots=True)
class Unit:
    """One device, or one MIG instance, and what is read of it."""

    device: Device
    readings: tuple[Guarded, ...]
    gpm: Gpm


class Units:
    """Makes them."""

    def __init__(
        self,
        calls: Calls,
        tell: Callable[[DeviceEvent], None],
        resolve: processes.Resolve,
        counters_allowed: Callable[[], bool],
    ) -> None:
        """*tell* takes edges of throttling; *resolve* finds processes."""
        self._calls = calls
        self._tell = tell
        self._resolve = resolve
        self._counters_allowed = counters_allowed

    def ask(self, default: Any, call: str, *arguments: Any, first: bool = False) -> Any:
        """Ask something that not every device knows."""
        try:
            answer = self._calls(call, *arguments)
        except self._calls.nvml.NVMLError:
            return default
        return answer[0] if first else answer

    def unit(self, uuid: str, handle: Any, parent: tuple[str, Any] | None) -> Unit:
        """Make the readings of a device; *parent* is UUID and handle of that it is a part of."""
        index = self.ask(0, "nvmlDeviceGetIndex", parent[1] if parent else handle)
        memory = self.ask(None, "nvmlDeviceGetMemoryInfo", handle)
        device = Device(
            id=uuid,
            name=str(self.ask("NVIDIA GPU", "nvmlDeviceGetName", handle)),
            vendor="NVIDIA",
            ordinal=index,
            total_bytes=memory.total if memory else 0,
            parent=parent[0] if parent else "",
            driver=str(self.ask("", "nvmlSystemGetDriverVersion")),
        )
        if parent:
            readings, gpm = self._of_instance(uuid, handle, parent[1])
        else:
            readings, gpm = self._of_device(uuid, handle)
        return Unit(device, tuple(Guarded(one, self._calls, uuid) for one in readings), gpm)

    def _of_device(self, uuid: str, handle: Any) -> tuple[list[Reading], Gpm]:
        calls = self._calls
        fields = Fields(calls, handle, uuid, FAST, "fast")
        gpm = Gpm(calls, handle, uuid, allowed=self._counters_allowed, known=fields.counts)
        buffer = partial(buffers.Buffer, calls, handle, uuid)
        clocks = partial(Clocks, calls, handle=handle, device=uuid,
                         tell=self._tell, counted=fields.counts)  # fmt: skip
        return [
            Either(calls, buffer(buffers.GPU), self._rates(uuid, handle)),
            buffer(buffers.MEMORY),
            Either(calls, buffer(buffers.POWER),
                   Fields(calls, handle, uuid, (POWER_INSTANT,), "fast")),
            buffer(buffers.SM_CLOCK),
            buffer(buffers.MEMORY_CLOCK, "slow"),
            *self._memory(uuid, handle),
            fields,
            Fields(calls, handle, uuid, SLOW, "slow"),
            gpm,
            Either(calls, clocks(call="nvmlDeviceGetCurrentClocksEventReasons"),
                   clocks(call="nvmlDeviceGetCurrentClocksThrottleReasons")),
            self._temperature(uuid, handle),
            processes.Utilization(calls, handle, uuid, self._resolve),
        ], gpm  # fmt: skip

    def _of_instance(self, uuid: str, handle: Any, whole: Any) -> tuple[list[Reading], Gpm]:
        """A MIG instance has memory, processes and hardware counters of its own, and no more."""
        instance = self.ask(None, "nvmlDeviceGetGpuInstanceId", handle)
        gpm = Gpm(self._calls, whole, uuid, instance=instance, allowed=self._counters_allowed)
        counters = [gpm] if instance is not None else []
        return [*self._memory(uuid, handle), *counters], gpm

    def _memory(self, uuid: str, handle: Any) -> list[Reading]:
        calls = self._calls
        by_process = partial(processes.Memory, calls, handle=handle, device=uuid,
                             resolve=self._resolve)  # fmt: skip
        call = "nvmlDeviceGetMemoryInfo"  # the driver's reserve counts as in use
        older = Value(calls, call, lambda: float(calls(call, handle).used), USAGE, uuid)
        return [
            Either(calls, Memory(calls, handle, uuid), older),
            Either(
                calls,
                by_process(call="nvmlDeviceGetComputeRunningProcesses_v3"),
                by_process(call="nvmlDeviceGetComputeRunningProcesses_v2"),
            ),
        ]

    def _rates(self, uuid: str, handle: Any) -> Reading:
        """Of the driver's last period, a sixth of a second to a second long."""
        calls, call = self._calls, "nvmlDeviceGetUtilizationRates"
        name = buffers.GPU.name
        return Value(calls, call, lambda: float(calls(call, handle).gpu), name, uuid, scale=1e-2)

    def _temperature(self, uuid: str, handle: Any) -> Reading:
        newer, older = "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature"
        return Either(
            self._calls,
            *(
                Value(self._calls, call, partial(self._calls, call, handle, 0),
                      "hw.temperature", uuid, detail="gpu")
                for call in (newer, older)
            ),
        )  # fmt: skip
