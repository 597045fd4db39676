"""Samples: readings of a resource over a stretch of time, and the names that they may have.

Names are OpenTelemetry's where a convention exists (semantic conventions 1.44, `process.*`,
`system.*`, `hw.*`), `stagescope.*` and `model_server.*` where none does; docs/attributes.md is
printed from `SAMPLE_NAMES`. What could not be read is absent, never 0.
"""

from __future__ import annotations

from dataclasses import dataclass

LEVEL = "level"
"""A sample's value is how high something stood, on average, from its start to its end."""
AMOUNT = "amount"
"""A sample's value is how much there was of something from its start to its end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading; times are ns on the monotonic clock of the host that it was read on."""

    name: str
    """One of `SAMPLE_NAMES`."""
    start_ns: int
    end_ns: int
    """Equal to start_ns where the reading is of one moment."""
    value: float
    """In the unit of its name."""
    pid: int = 0
    """The process that it is of; 0: of the host or of a device."""
    device: str = ""
    """UUID of the device that it is of; empty: none."""
    detail: str = ""
    """What tells apart the series of one name: `read` or `write`, a throttle reason, a stage."""


@dataclass(frozen=True, slots=True)
class SampleName:
    """What a sample may be called."""

    name: str
    unit: str
    """As UCUM writes it: `s`, `By`, `1`, `W`, `{thread}`."""
    kind: str
    """`LEVEL` (a gauge) or `AMOUNT` (a counter's growth)."""
    doc: str
    detail: str = ""
    """What `Sample.detail` holds, as an attribute's name; empty where it holds nothing."""
    stability: str = "stagescope, kept within a major version"


OTEL = "OpenTelemetry, development"

GPU: tuple[SampleName, ...] = (
    SampleName(
        "hw.gpu.utilization", "1", LEVEL,
        "Share of the time in which a kernel ran on the device, whatever its size.",
        stability=OTEL,
    ),
    SampleName(
        "hw.gpu.memory.usage", "By", LEVEL,
        "Device memory in use by all processes, without the driver's own reserve where it is told.",
        stability=OTEL,
    ),
    SampleName(
        "hw.gpu.memory.limit", "By", LEVEL,
        "Device memory that there is.",
        stability=OTEL,
    ),
    SampleName(
        "hw.gpu.io", "By", AMOUNT,
        "Bytes over the host's bus (PCIe), as seen from the device.",
        "network.io.direction", OTEL,
    ),
    SampleName(
        "hw.power", "W", LEVEL,
        "Power that the device drew.",
        stability=OTEL,
    ),
    SampleName(
        "hw.energy", "J", AMOUNT,
        "Energy that the device used, by its own counter.",
        stability=OTEL,
    ),
    SampleName(
        "hw.temperature", "Cel", LEVEL,
        "Temperature of the chip (`gpu`) or its memory (`memory`).",
        "hw.sensor_location", OTEL,
    ),
    SampleName(
        "hw.errors", "{error}", AMOUNT,
        "Memory errors: `corrected` (one bit) and `uncorrected` (two bits).",
        "error.type", OTEL,
    ),
    SampleName(
        "model_server.gpu.memory.busy", "1", LEVEL,
        "Share of the time in which device memory was read or written.",
    ),
    SampleName(
        "model_server.gpu.memory.reserved", "By", LEVEL,
        "Device memory that the driver keeps for itself.",
    ),
    SampleName(
        "model_server.gpu.clock", "Hz", LEVEL,
        "Clock of the multiprocessors (`sm`) or of the memory (`memory`).",
        "model_server.gpu.clock.domain",
    ),
    SampleName(
        "model_server.gpu.sm.active", "1", LEVEL,
        "Share of the multiprocessors that had work, averaged over time.",
    ),
    SampleName(
        "model_server.gpu.sm.occupancy", "1", LEVEL,
        "Warps resident, as a share of those that there is room for.",
    ),
    SampleName(
        "model_server.gpu.tensor.active", "1", LEVEL,
        "Share of the time in which tensor cores worked, averaged over multiprocessors.",
    ),
    SampleName(
        "model_server.gpu.dram.active", "1", LEVEL,
        "Device memory's bandwidth in use, as a share of what it can do.",
    ),
    SampleName(
        "model_server.gpu.nvlink.io", "By", AMOUNT,
        "Payload over all NVLinks of the device, as seen from it.",
        "network.io.direction",
    ),
    SampleName(
        "model_server.gpu.throttle.time", "s", AMOUNT,
        "For how long the device was held below its clocks, by reason.",
        "model_server.gpu.throttle.reason",
    ),
    SampleName(
        "model_server.gpu.xid", "{event}", AMOUNT,
        "Faults that the driver told of as they happened, by their XID number.",
        "model_server.gpu.xid.number",
    ),
    SampleName(
        "model_server.gpu.process.memory", "By", LEVEL,
        "Device memory of one process; all processes that are not to be named here are one row.",
        "model_server.gpu.process",
    ),
    SampleName(
        "model_server.gpu.process.utilization", "1", LEVEL,
        "Share of the time in which kernels of one process ran on the device.",
        "model_server.gpu.process",
    ),
    SampleName(
        "stagescope.nvml.call_time", "s", LEVEL,
        "Median time of one call of the driver's library, by function.",
        "stagescope.nvml.call",
    ),
)  # fmt: skip

SAMPLE_NAMES: tuple[SampleName, ...] = (*GPU,)
"""Every name, host first; each sampler's names stand in one block."""
