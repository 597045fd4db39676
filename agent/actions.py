"""What a trigger may start: the seams to the samplers that look closer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stagescope.records import Process


class StackAction(Protocol):
    """Samples the stacks of one process for a while."""

    def window(self, ring: Path, process: Process, reason: str, seconds: float) -> bool:
        """Begin, and return at once; False where it cannot: it is busy, off, or not permitted.

        *ring* is the recorder file of *process*, *reason* becomes `StackSpan.reason`.
        """
        ...


class CaptureAction(Protocol):
    """Captures the kernels of one process."""

    def start(self, ring: Path, process: Process, reason: str) -> str | None:
        """Begin one bounded capture, and return its id at once; None where it cannot."""
        ...


@dataclass(slots=True)
class Actions:
    """What this agent can do; a sampler puts itself here when it is made."""

    stacks: StackAction | None = None
    capture: CaptureAction | None = None
