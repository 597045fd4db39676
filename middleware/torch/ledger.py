"""The ledger of a capture: which thread was in which stage when, for as long as a profiler records.

Operators and launches are joined to stages by thread and time from it, so nothing is annotated in
the server's code. It also counts the model's calls, by which a capture is bounded.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.recording.timeline_group import TimelineGroup
from stagescope.recorder import format as fmt
from stagescope.stages import OTHER, stage_of

MOST = 100_000
"""Openings that one ledger keeps; further ones are counted."""
HOLD_S = 1.0
"""How long at most a gate holds a thread of the server's."""

REQUEST, BATCH, MEMBERS = "request", "batch", "members"


class Opening(NamedTuple):
    """A stage that one thread opened; `end_ns` 0: still open."""

    code: int
    thread_id: int
    start_ns: int
    end_ns: int
    trace_id: bytes
    span_id: bytes
    kind: str
    """Whose it is: a request's, a batch's own phase, or that of all members of a batch."""


class Gate:
    """Holds the thread that has just ended a model call, so that the profiler starts between two.

    A thread that is within a call when a profiler starts may fail in it: torch's
    `_RecordFunctionFast` then leaves a scope that it never entered.
    """

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = threading.Event()

    def hold(self) -> None:
        """Stand here until it is opened, for HOLD_S at most; the first to come alone."""
        if not self.reached.is_set():
            self.reached.set()
            self._open.wait(HOLD_S)

    def open(self) -> None:
        """Let go who stands here, and hold nobody any more."""
        self.reached.set()
        self._open.set()


class Ledger:
    """A `StageObserver` that keeps what it is told, until it holds *most* openings."""

    def __init__(self, clock: Callable[[], int], most: int = MOST) -> None:
        self.closings = 0
        self.dropped = 0
        self.begun = threading.Event()
        """Set when a model call has begun."""
        self.gate: Gate | None = None
        self.may_hold: Callable[[], bool] = lambda: True
        """Asked in the thread in question, before a gate holds it."""
        self._clock = clock
        self._most = most
        self._kept: list[Opening] = []
        self._open: dict[tuple[int, int], Opening] = {}
        self._inside: dict[int, int] = {}
        self._calls = {REQUEST: 0, BATCH: 0, MEMBERS: 0}
        self._is_call: dict[int, bool] = {}

    @property
    def busy(self) -> bool:
        """True while the model is called."""
        return bool(self._inside)

    @property
    def calls(self) -> int:
        """Model calls that ended: batches where there is a batcher, else requests' inferences."""
        return self._calls[BATCH] or max(self._calls[REQUEST], self._calls[MEMBERS])

    def opened(self, timeline: Timeline, index: int, code: int) -> None:
        """Keep an opening."""
        kind = _kind(timeline)
        self._open[id(timeline), index] = Opening(
            code, threading.get_native_id(), self._clock(), 0, timeline.trace_id, timeline.span_id,
            kind,
        )  # fmt: skip
        if self._of_inference(code):
            self._inside[id(timeline)] = self._inside.get(id(timeline), 0) + 1
            self.begun.set()

    def closed(self, timeline: Timeline, index: int, code: int) -> None:
        """Keep its end; where a model call ended, count it, and stand at the gate if there is one."""
        opening = self._open.pop((id(timeline), index), None)
        if opening is None:
            return  # It was open before we came.
        self.closings += 1
        if len(self._kept) < self._most:
            self._kept.append(opening._replace(end_ns=self._clock()))
        else:
            self.dropped += 1
        if not self._of_inference(code):
            return
        inside = self._inside.pop(id(timeline), 1) - 1
        if inside:
            self._inside[id(timeline)] = inside
            return
        self._calls[opening.kind] += 1
        if self.gate is not None and self.may_hold():
            self.gate.hold()

    def openings(self) -> list[Opening]:
        """Return all that is kept, what is still open last."""
        return [*self._kept, *self._open.copy().values()]

    def to_json(self) -> dict[str, Any]:
        """Return names of stages and threads, and the openings as rows that refer to them."""
        openings = self.openings()
        names = {code: name for name, code in CODES.items()}
        seen = {opening.thread_id for opening in openings}
        return {
            "stages": {code: names.get(code, OTHER) for code in {one.code for one in openings}},
            "threads": {
                thread.native_id: {"name": thread.name, "ident": thread.ident}
                for thread in threading.enumerate()
                if thread.native_id in seen
            },
            "openings": [
                [one.code, one.thread_id, one.start_ns, one.end_ns, one.trace_id.hex(),
                 one.span_id.hex(), one.kind]
                for one in openings
            ],
            "openings_dropped": self.dropped,
        }  # fmt: skip

    def _of_inference(self, code: int) -> bool:
        known = self._is_call.get(code)
        if known is None:
            name = next((name for name, its in CODES.items() if its == code), OTHER)
            known = self._is_call[code] = stage_of(name) == "inference"
        return known


def _kind(timeline: Timeline) -> str:
    if isinstance(timeline, TimelineGroup):
        return MEMBERS
    return BATCH if timeline.slot.raw[fmt.OPENED_AT] == fmt.KIND_BATCH else REQUEST
