"""NVIDIA's GPUs, by NVML: which devices there are, and all that is read of each (docs/gpu.md)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Final

from stagescope.agent.gpu_nvml_calls import SLOW_S, Calls, Said
from stagescope.agent.gpu_nvml_events import Events
from stagescope.agent.gpu_nvml_processes import resolver
from stagescope.agent.gpu_nvml_reading import DeviceGone, Moment
from stagescope.agent.gpu_nvml_units import Unit, Units
from stagescope.agent.gpu_probe import Device, DeviceEvent, NoGpu, Tier
from stagescope.samples import Sample

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
        say: Said | None = None,
        look_again_s: float = LOOK_AGAIN_S,
        slow_s: float = SLOW_S,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        """Raises NoGpu. *served* gives PIDs of served processes; *counters_allowed*: GPM is."""
        self._say = say or Said()
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
        """Give those that were there at the last poll."""
        return [unit.device for unit in self._units.values()]

    def capabilities(self) -> frozenset[str]:
        """Give the names that some device can still give."""
        return frozenset(
            name
            for unit in self._units.values()
            for guarded in unit.readings
            if not guarded.off
            for name in guarded.reading.gives
        )

    def under_way(self) -> tuple[str, int] | None:
        """Give the call that the driver has not answered yet, and since when."""
        return self._calls.under_way

    def poll(self, tier: Tier) -> list[Sample]:
        """Read every device; one that is gone is dropped. Raises NoGpu where the driver is."""
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
        """Give faults and edges of throttling as they happen."""
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
            f"{unit.device.name} {uuid} is gone: {why}; looked for again every "
            f"{self._look_again_s:g} s",
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
        """Give UUID and handle of each device and instance, with those of the device around it."""
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
