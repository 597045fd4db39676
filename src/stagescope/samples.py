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

SAMPLE_NAMES: tuple[SampleName, ...] = (
    # The agent's own cost.
    SampleName(
        "stagescope.collector.cpu_time", "s", AMOUNT,
        "CPU time of one of the agent's collectors; `other`: what the agent used besides, to read "
        "records, export and answer.",
        detail="stagescope.collector",
    ),
)  # fmt: skip
"""Every name, host first; each sampler's names stand in one block."""
