"""What a check of the doctor's found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

OK: Final = "ok"
WARN: Final = "warn"
"""It works in part, or something else will not."""
NO: Final = "no"

SPANS: Final = "spans"
HOST: Final = "host"
STACKS: Final = "stacks"
KERNELS: Final = "kernels"
GPU: Final = "gpu"
MEASURABLE: Final = (SPANS, HOST, STACKS, KERNELS, GPU)
"""What there is to measure: requests and their stages; CPU, memory and the rest of host and
process; Python stacks; kernels (on a CPU, operators) of a capture; the GPU's own figures."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the screen."""

    status: str
    told: str
    """What can be measured, or what is missing: a sentence without its full stop."""
    do: tuple[str, ...] = ()
    """The exact grants, packages or commands that mend it; any of them will do."""
    gives: tuple[str, ...] = ()
    """Of `MEASURABLE`, what can be measured by this."""
    lacks: tuple[str, ...] = ()
    """What cannot be measured this way; another way may be there."""
    forbids: tuple[str, ...] = ()
    """What cannot be measured at all as long as this is so."""
    facts: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The same for machines: keys that stay, values that JSON has."""


def plural(count: int, noun: str) -> str:
    """Return `1 process`, `2 processes`."""
    many = noun + ("es" if noun.endswith("s") else "s")
    return f"{count} {noun if count == 1 else many}"
