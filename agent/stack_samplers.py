"""The seam between what samples stacks (py-spy, the served process itself) and what asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stagescope.agent.stage_labels import RawStack
from stagescope.records import Process


@dataclass(frozen=True, slots=True)
class Target:
    """A served process, as `Agent.alive` gives it."""

    ring: Path
    process: Process

    @property
    def pid(self) -> int:
        """Its process id, as it sees it itself."""
        return self.process.pid


class Window(Protocol):
    """Sampling of one process that is going on."""

    target: Target

    @property
    def cpu_s(self) -> float:
        """CPU seconds that it has cost the agent's side so far, beside the thread that polls."""
        ...

    def poll(self) -> Sequence[RawStack] | None:
        """Give what was seen once it is over, None until then; never waits.

        Raises StagescopeError, one sentence, where it failed.
        """
        ...

    def finish(self) -> None:
        """Let it come to its end now; `poll` gives what was seen so far."""

    def close(self) -> None:
        """Give it up; nothing is left of it."""


class StackSampler(Protocol):
    """One way to see stacks."""

    @property
    def how(self) -> str:
        """`StackSpan.how`."""
        ...

    @property
    def error_ns(self) -> int:
        """How far the times of what it sees may be off."""
        ...

    def begin(self, target: Target, seconds: float, pace: float = 1.0) -> Window:
        """Begin to sample *target* for *seconds*, at *pace* times the rate. Raises StagescopeError."""
        ...

    def dump(self, target: Target, timeout_s: float) -> Sequence[RawStack]:
        """Give the stacks of this moment, waiting *timeout_s* at most. Raises StagescopeError."""
        ...
