"""Other vendors' accelerators, as far as torch knows: asked of the served processes' probes.

AMD, Intel, Apple and TPU: which devices there are, their memory, and what each process has of it.
Utilisation, power and faults need the vendor's own library, and are absent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from stagescope.agent.gpu.probe import Device, DeviceEvent, Tier
from stagescope.agent.probe import ask, probe_of
from stagescope.errors import StagescopeError
from stagescope.records import Process
from stagescope.samples import Sample

ANSWER_S: Final = 1.0
VENDORS: Final = {"hip": "AMD", "cuda": "NVIDIA", "xpu": "Intel", "mps": "Apple", "xla": "Google"}


class TorchProbe:
    """Asks every served process that has loaded torch."""

    name = "torch"

    def __init__(
        self,
        alive: Callable[[], Sequence[tuple[Path, Process]]],
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        """*alive* gives recorder files and their processes."""
        self._alive = alive
        self._clock = clock
        self._devices: dict[str, Device] = {}
        self._answering: set[Path] = set()
        self._stopped = threading.Event()

    def devices(self) -> Sequence[Device]:
        """Return all that some process has reported."""
        return list(self._devices.values())

    def poll(self, tier: Tier) -> list[Sample]:
        """Ask those that have devices each time, and all others at every slow poll."""
        samples: dict[tuple[str, int, str], Sample] = {}
        for ring, process in self._alive():
            if self._stopped.is_set():
                break
            if (tier == "fast") == (ring in self._answering):
                for sample in self._of(ring, process.pid):
                    samples[sample.name, sample.pid, sample.device] = sample
        return list(samples.values())

    def events(self) -> Iterator[DeviceEvent]:
        """Torch reports none."""
        return iter(())

    def stop(self) -> None:
        """Ask no more."""
        self._stopped.set()

    def close(self) -> None:
        """Nothing is held."""

    def _of(self, ring: Path, pid: int) -> Iterator[Sample]:
        self._answering.discard(ring)
        try:
            answer = ask(probe_of(ring), "torch", driver=True, timeout_s=ANSWER_S)
        except StagescopeError:  # it has ended, has no probe, or is an older one
            return
        now_ns = self._clock()
        for told in answer.get("memory", ()):
            if "name" not in told:
                return  # an older stagescope's
            self._answering.add(ring)
            device = self._device(told)
            memory = {
                ("hw.gpu.memory.usage", 0): told.get("used_bytes"),
                ("hw.gpu.memory.limit", 0): told.get("total_bytes"),
                ("model_server.gpu.process.memory", pid): told["bytes"].get("reserved"),
            }
            for (name, of), held in memory.items():
                if held is not None:
                    yield Sample(name, now_ns, now_ns, float(held), of, device.id)

    def _device(self, told: Mapping[str, Any]) -> Device:
        self._devices[told["device"]] = device = Device(
            id=told["device"],
            name=told["name"],
            vendor=VENDORS.get(platform := str(told["platform"]), platform),
            ordinal=told["ordinal"],
            total_bytes=told.get("total_bytes", 0),
        )
        return device
