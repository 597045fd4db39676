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

DEVICE_TIMES: tuple[SampleName, ...] = (
    SampleName(
        "model_server.stage.device_time", "s", AMOUNT,
        "Time that a stream of the device spent between the events at which the stage opened and "
        "closed, stages inside it left out (docs/device-time.md).",
        "model_server.stage",
    ),
    SampleName(
        "model_server.stage.device_timed", "{opening}", AMOUNT,
        "Openings of the stage whose device time is measured to their end.",
        "model_server.stage",
    ),
    SampleName(
        "model_server.stage.device_opened", "{opening}", AMOUNT,
        "Openings of the stage in a process whose device times are taken; of these "
        "`model_server.stage.device_timed` are measured.",
        "model_server.stage",
    ),
    SampleName(
        "model_server.stage.device_missed", "{opening}", AMOUNT,
        "Openings without a device time: `capture` (of a graph), `full` (the device was too far "
        "behind), `unclosed` (the request ended first).",
        "reason",
    ),
)  # fmt: skip

TORCH_MEMORY: tuple[SampleName, ...] = (
    SampleName(
        "model_server.torch.memory.allocated", "By", LEVEL, "Device memory in torch's tensors."
    ),
    SampleName(
        "model_server.torch.memory.active", "By", LEVEL,
        "Device memory in blocks that are in use or wait for a stream to be done with them.",
    ),
    SampleName(
        "model_server.torch.memory.reserved", "By", LEVEL,
        "Device memory that torch's allocator holds, used or not.",
    ),
    SampleName(
        "model_server.torch.memory.inactive_split", "By", LEVEL,
        "Device memory in unused parts of split blocks, which cannot be given back.",
    ),
    SampleName(
        "model_server.torch.memory.requested", "By", LEVEL,
        "Device memory that was asked for, before rounding.",
    ),
    SampleName(
        "model_server.torch.memory.peak", "By", LEVEL,
        "Most of one of these that there was since the process, or whoever reset it, began.",
        "what",
    ),
    SampleName(
        "model_server.torch.memory.fragmentation", "1", LEVEL,
        "`inactive_split` as a share of `reserved`.",
    ),
    SampleName(
        "model_server.torch.memory.rounding", "By", LEVEL,
        "`allocated` less `requested`: what rounding up costs.",
    ),
    SampleName(
        "model_server.torch.memory.events", "{event}", AMOUNT,
        "What the allocator did, by torch's name of the counter: `num_alloc_retries`, `num_ooms`, "
        "`num_device_alloc`, `num_device_free`, `num_sync_all_streams`.",
        "counter",
    ),
    SampleName(
        "model_server.torch.pinned.allocated", "By", LEVEL,
        "Pinned host memory that torch's allocator holds.",
    ),
    SampleName(
        "model_server.torch.pinned.active", "By", LEVEL,
        "Pinned host memory in blocks that are in use.",
    ),
    SampleName(
        "model_server.torch.pinned.peak", "By", LEVEL,
        "Most of one of these that there was, by torch's own approximation.",
        "what",
    ),
    SampleName(
        "model_server.torch.pinned.events", "{event}", AMOUNT,
        "Blocks taken from and given back to the driver: `num_host_alloc`, `num_host_free`.",
        "counter",
    ),
    SampleName(
        "model_server.torch.pinned.driver_time", "s", AMOUNT,
        "Time in the driver's calls for pinned memory: `alloc`, `free`.",
        "call",
    ),
)  # fmt: skip

SAMPLE_NAMES: tuple[SampleName, ...] = (*DEVICE_TIMES, *TORCH_MEMORY)
"""Every name, host first; each sampler's names stand in one block."""
