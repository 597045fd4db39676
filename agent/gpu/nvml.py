"""NVIDIA's GPUs, by NVML: which devices there are, and all that is read of each (docs/gpu.md)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any, Final

from stagescope.agent.gpu import nvml_counters as buffers
from stagescope.agent.gpu import nvml_processes as processes
from stagescope.agent.gpu.nvml_calls import SLOW_S, Calls
from stagescope.agent.gpu.nvml_counters import FAST, POWER_INSTANT, SLOW, Clocks, Fields
from stagescope.agent.gpu.nvml_events import Events
from stagescope.agent.gpu.nvml_gpm import Gpm
from stagescope.agent.gpu.nvml_processes import resolver
from stagescope.agent.gpu.nvml_readings import (
    USAGE,
    DeviceGone,
    Either,
    Guarded,
    Memory,
    Moment,
    Reading,
    Value,
)
from stagescope.agent.gpu.probe import Device, DeviceEvent, NoGpu, Tier
from stagescope.agent.log_once import LogOnce
from stagescope.samples import Sample


@dataclass(frozen=True, slots=True)
class Unit:
    """One device, or one MIG instance, and what is read of it."""

    device: Device
    readings: tuple[Guarded, ...]
    gpm: Gpm


class Units:
    """Makes units."""

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


LOOK_AGAIN_S: Final = 60.0
"""How often it is asked which devices there are: one that was lost may be back."""


class NvmlProbe:
    """All devices of the driver."""

    name = "nvml"

    def __init__(
        self,
        served: Callable[[], Collection[int]] = tuple,
        counters_allowed: Callable[[], bool] = lambda: True,
        *,
        say: LogOnce | None = None,
        look_again_s: float = LOOK_AGAIN_S,
        slow_s: float = SLOW_S,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        """Raises NoGpu. *served* gives PIDs of served processes; *counters_allowed*: GPM is."""
        self._say = say or LogOnce("gpu: ")
        self._nvml = _bindings()
        try:
            self._nvml.nvmlInit()
        except self._nvml.NVMLError as error:
            raise NoGpu(f"NVIDIA's driver does not answer: {error}") from error
        self._clock = clock
        self._wall = wall
        self._calls = Calls(self._nvml, self._say, slow_s, clock)
        self._units: dict[str, Unit] = {}
        self._handles: Mapping[str, object] = {}
        self._events = Events(self._nvml, lambda: self._handles, self._say, clock)
        self._make = Units(self._calls, self._events.put, resolver(served), counters_allowed)
        self._stopped = threading.Event()
        self._look_again_s = look_again_s
        self._look_again_ns = self._costs_ns = 0

    def devices(self) -> Sequence[Device]:
        """Return those that were there at the last poll."""
        return [unit.device for unit in self._units.values()]

    def under_way(self) -> tuple[str, int] | None:
        """Return the call that the driver has not answered yet, and since when."""
        return self._calls.under_way

    def poll(self, tier: Tier) -> list[Sample]:
        """Read every device; drop one that does not answer. Raises NoGpu where no driver does."""
        if self._clock() >= self._look_again_ns:
            self._look()
        samples: list[Sample] = []
        for unit in tuple(self._units.values()):
            try:
                self._read(unit, tier, samples)
            except DeviceGone as gone:
                self._drop(unit, str(gone))
            else:
                self._say.forget(f"gone {unit.device.id}")
        return samples + (self._costs() if tier == "slow" else [])

    def events(self) -> Iterator[DeviceEvent]:
        """Return faults and edges of throttling as they happen."""
        return iter(self._events)

    def stop(self) -> None:
        """Make `events` end, and give nothing more."""
        self._stopped.set()
        self._events.stop()

    def close(self) -> None:
        """Free what the driver keeps for it."""
        for unit in self._units.values():
            unit.gpm.close()
        self._nvml.nvmlShutdown()

    def _moment(self) -> Moment:
        return Moment(self._clock(), self._wall())

    def _read(self, unit: Unit, tier: Tier, samples: list[Sample]) -> None:
        if tier == "slow" and unit.device.total_bytes:
            now_ns, total = self._clock(), float(unit.device.total_bytes)
            samples.append(
                Sample("hw.gpu.memory.limit", now_ns, now_ns, total, device=unit.device.id)
            )
        for guarded in unit.readings:
            if guarded.reading.tier == tier and not self._stopped.is_set():
                samples += guarded.read(self._moment())

    def _costs(self) -> list[Sample]:
        begun_ns, self._costs_ns = self._costs_ns, self._clock()
        return [
            Sample(
                "stagescope.nvml.call_time", begun_ns or self._costs_ns, self._costs_ns, s,
                detail=call,
            )
            for call, s in self._calls.medians().items()
        ]  # fmt: skip

    def _drop(self, unit: Unit, why: str) -> None:
        uuid = unit.device.id
        gone = [one for one in self._units.values() if uuid in (one.device.id, one.device.parent)]
        for one in gone:
            one.gpm.close()
            del self._units[one.device.id]
        self._handles = {key: self._handles[key] for key in self._handles if key in self._units}
        self._say(
            f"{unit.device.name} {uuid} is gone: {why}; looked for every {self._look_again_s:g} s",
            about=f"gone {uuid}",
        )

    def _look(self) -> None:
        """Find out which devices there are; those that are known keep what was read of them."""
        self._look_again_ns = self._clock() + int(self._look_again_s * 1e9)
        found: dict[str, Unit] = {}
        handles: dict[str, object] = {}
        for uuid, handle, parent in self._listed():
            if not parent:
                handles[uuid] = handle
            found[uuid] = self._units.get(uuid) or self._make.unit(uuid, handle, parent)
        for uuid in self._units.keys() - found.keys():
            self._units[uuid].gpm.close()
        self._units = found
        if handles.keys() != self._handles.keys():
            self._handles = handles  # a new set of events is made of them

    def _listed(self) -> Iterator[tuple[str, Any, tuple[str, Any] | None]]:
        """Yield UUID and handle of each device and instance, with those of the device around it."""
        try:
            count = self._calls("nvmlDeviceGetCount")
        except self._nvml.NVMLError as error:
            raise NoGpu(f"NVIDIA's driver does not answer: {error}") from error
        for index in range(count):
            try:
                handle = self._calls("nvmlDeviceGetHandleByIndex", index)
                uuid = str(self._calls("nvmlDeviceGetUUID", handle))
            except self._nvml.NVMLError as error:
                self._say(f"GPU {index} does not answer: {error}; asked again every "
                          f"{self._look_again_s:g} s", about=f"index {index}")  # fmt: skip
                continue
            yield uuid, handle, None
            for instance in self._instances(handle):
                if of_instance := self._make.ask("", "nvmlDeviceGetUUID", instance):
                    yield str(of_instance), instance, (uuid, handle)

    def _instances(self, handle: Any) -> Iterator[Any]:
        if not self._make.ask(0, "nvmlDeviceGetMigMode", handle, first=True):
            return
        for index in range(self._make.ask(0, "nvmlDeviceGetMaxMigDeviceCount", handle)):
            instance = self._make.ask(None, "nvmlDeviceGetMigDeviceHandleByIndex", handle, index)
            if instance is not None:
                yield instance


def _bindings() -> ModuleType:
    """Import pynvml, which not every agent needs."""
    try:
        import pynvml
    except ImportError as missing:
        raise NoGpu(f"NVIDIA's GPUs are not read: {missing}; pip install nvidia-ml-py") from missing
    module: ModuleType = pynvml
    return module
