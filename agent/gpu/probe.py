"""GPU probes: what the GPU sampler reads from, whoever made the GPU (docs/gpu.md)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from stagescope.samples import Sample

Tier = Literal["fast", "slow"]
"""`fast`: what changes all the time, once a second. `slow`: lists and totals, every ten seconds."""

XID: Final = "xid"
ECC: Final = "ecc"
THROTTLE_BEGAN: Final = "throttle_began"
THROTTLE_ENDED: Final = "throttle_ended"

UNKNOWN_PROCESS: Final = "unknown process"
"""The detail of a reading of processes that the probe sees and this host's /proc does not."""


class NoGpu(Exception):
    """Nothing can be read here now; one sentence says why."""


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU, or a part of one that is a device of its own (a MIG instance)."""

    id: str
    """Its UUID where it has one; what `Sample.device` holds."""
    name: str
    """The product's name."""
    vendor: str
    ordinal: int
    """Its number in the driver's order, which CUDA_VISIBLE_DEVICES may change for a process."""
    total_bytes: int
    """Memory; 0: unknown."""
    parent: str = ""
    """Id of the GPU that it is a part of; empty: it is whole."""
    driver: str = ""
    replay: bool = False
    """True where its samples are a recording's."""


@dataclass(frozen=True, slots=True)
class DeviceEvent:
    """Something that happened to a device at one moment."""

    at_ns: int
    """Monotonic, when it was reported."""
    device: str
    kind: str
    """`XID`, `ECC`, `THROTTLE_BEGAN` or `THROTTLE_ENDED`."""
    detail: str
    """The XID's number, the throttle's reason."""


class GpuProbe(Protocol):
    """One way to read devices. `poll` is called by one thread, `events` iterated by another.

    Both may block in a driver. A reading that could not be had is absent, never 0.
    """

    @property
    def name(self) -> str:
        """A word for it: `nvml`, `torch`, `replay`."""
        ...

    def devices(self) -> Sequence[Device]:
        """Return the devices that there are now."""
        ...

    def poll(self, tier: Tier) -> list[Sample]:
        """Read what is due. Raises NoGpu where nothing is left to be read."""
        ...

    def events(self) -> Iterator[DeviceEvent]:
        """Return events as they happen, until `stop`."""
        ...

    def stop(self) -> None:
        """Make `events` end soon, and `poll` give nothing more; from any thread, never blocks."""

    def close(self) -> None:
        """Release the driver, in the thread that polled, once `events` has ended."""
