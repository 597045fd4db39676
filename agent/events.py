"""Notices from samplers to triggers: a bounded queue into which any thread may put."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

from stagescope.records import Process

MOST: Final = 256
"""Far more than triggers may act on in an hour; what finds no room is dropped and counted."""

SLOW: Final = "slow"
LOOP_LAG: Final = "loop_lag"
OOM: Final = "oom"
THROTTLE: Final = "throttle"
XID: Final = "xid"
KINDS: Final = (SLOW, LOOP_LAG, OOM, THROTTLE, XID)
"""What a notice may be of. A notice of another kind is counted, and starts nothing."""


@dataclass(frozen=True, slots=True)
class Notice:
    """Something that somebody should look at now."""

    kind: str
    """One of `KINDS`."""
    pid: int
    """The served process that it is about; 0: of the host or of a device."""
    device: str
    """UUID of the device; empty: none."""
    at_ns: int
    """When it was so, on the host's monotonic clock."""
    sentence: str
    """What happened, for people, with its figures: it is kept as the reason of what it starts."""


class EventQueue:
    """What was noticed and not yet taken; any thread puts, the triggers take."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._waiting: deque[Notice] = deque()
        self._put = self._dropped = 0
        self._lock = threading.Lock()

    def put(self, notice: Notice) -> None:
        """Add it; never blocks. Where there is no room it is dropped, and counted."""
        with self._lock:
            if len(self._waiting) >= self._most:
                self._dropped += 1
                return
            self._put += 1
            self._waiting.append(notice)

    def take(self) -> list[Notice]:
        """Return what waits, oldest first, and forget it."""
        with self._lock:
            taken = list(self._waiting)
            self._waiting.clear()
        return taken

    def counters(self) -> dict[str, float]:
        """Return how many were put, and dropped for want of room."""
        with self._lock:
            return {"notices": self._put, "notices_dropped": self._dropped}


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
