"""What samplers put in and load runs, metrics and people take out: samples, stacks, kernels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from stagescope.agent.gpu_probe import Device, DeviceEvent
from stagescope.agent.kept import Kept
from stagescope.agent.sample_store import SampleStore
from stagescope.kernels import KernelRow
from stagescope.stacks import StackSpan

MAX_STACKS = 50_000
"""About 1 kB each."""
MAX_KERNELS = 20_000
MAX_DEVICE_EVENTS = 10_000


@dataclass(frozen=True, slots=True)
class Evidence:
    """One agent's samples, stacks and kernels of the last hour or so."""

    samples: SampleStore = field(default_factory=SampleStore)
    stacks: Kept[StackSpan] = field(default_factory=lambda: Kept[StackSpan](MAX_STACKS))
    kernels: Kept[KernelRow] = field(default_factory=lambda: Kept[KernelRow](MAX_KERNELS))
    device_events: Kept[DeviceEvent] = field(
        default_factory=lambda: Kept[DeviceEvent](MAX_DEVICE_EVENTS)
    )
    devices: dict[str, Device] = field(default_factory=dict[str, Device])
    """What `Sample.device` names, by it; a device that is gone stays, for its samples do."""
    before_reading: list[Callable[[float], None]] = field(default_factory=list[Any])
    """What to call, with seconds to wait at most, before a run's evidence is read: whoever
    samples in windows ends them and puts in what they saw."""
    counts: Counter[str] = field(default_factory=Counter[str])

    def settle(self, timeout_s: float = 2.0) -> None:
        """Wait until what was sampled up to now is here; not from the agent's loop."""
        for finish in self.before_reading:
            finish(timeout_s)

    def count(self, name: str, more: int = 1) -> None:
        """Count something that a sampler did or failed to do."""
        self.counts[name] += more

    def counters(self) -> dict[str, float]:
        """Give what was added and evicted, by kind."""
        return {
            **self.samples.counters(),
            **self.counts,
            **{f"stacks_{name}": value for name, value in self.stacks.counters().items()},
            **{f"kernels_{name}": value for name, value in self.kernels.counters().items()},
            **{f"device_events_{name}": n for name, n in self.device_events.counters().items()},
        }
