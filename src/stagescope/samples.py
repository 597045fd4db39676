"""Samples: readings of a resource over a stretch of time. What could not be read is absent, never 0.

The names that they may have stand in sample_names.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from stagescope.columns import HOST_CLOCK, column

LEVEL = "level"
"""A sample's value is how high something stood, on average, from its start to its end."""
AMOUNT = "amount"
"""A sample's value is how much there was of something from its start to its end."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading; times are ns on the monotonic clock of the host that it was read on."""

    name: str = field(metadata=column("what was read, a name of docs/attributes.md"))
    start_ns: int = field(metadata=column(f"beginning of what the value tells of; {HOST_CLOCK}"))
    end_ns: int = field(metadata=column("its end; equal to start_ns where it is of one moment"))
    value: float = field(metadata=column("in `unit`"))
    pid: int = field(
        default=0, metadata=column("the process that it is of; 0: the host or a device")
    )
    device: str = field(
        default="", metadata=column("UUID of the device that it is of; empty: none")
    )
    detail: str = field(
        default="",
        metadata=column("what tells apart series of one name: `read`, a throttle reason, a stage"),
    )


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
