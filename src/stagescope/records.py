"""What travels: one finished request or batch, as the server wrote it, read back.

All times are nanoseconds on the monotonic clock of the process's host, unless a name says `wall`.
Ids are lower-case hex, as in W3C Trace Context: 32 digits a trace, 16 a span.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from stagescope.stages import (
    CAPTURE,
    FIRST_REQUEST,
    IDLE,
    OTHER,
    StageSpan,
    StageStall,
    WaitFact,
    opened_last,
    stage_of,
)


class State(Enum):
    """How a record ended."""

    FINISHED = "finished"
    DIED = "died"
    """The process ended while this was in flight; its last open stage is where it died."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """One moment read on both clocks; turns monotonic into wall time (Unix epoch)."""

    monotonic_ns: int
    wall_ns: int

    def wall(self, monotonic_ns: int) -> int:
        """Return the wall time, ns since the Unix epoch, of *monotonic_ns*."""
        return monotonic_ns - self.monotonic_ns + self.wall_ns


@dataclass(frozen=True, slots=True)
class InstrumentCost:
    """What the middleware costs in this process, measured there when its recorder opened."""

    base_ns: int
    """One request without stages of the user's."""
    stage_ns: int
    """Opening and closing one stage."""


@dataclass(frozen=True, slots=True)
class Process:
    """The served process that wrote a recorder file."""

    ring_id: str
    """32 hex digits, new for each recorder file; OpenTelemetry's `service.instance.id`."""
    pid: int
    service: str
    host: str
    boot_id: str
    """Where two boot ids are equal, one monotonic clock serves both."""
    anchor: Anchor
    cost: InstrumentCost
    version: str
    """The stagescope that wrote."""
    python: str


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request: its identity, its outcome and its timeline."""

    process: Process
    seq: int
    """Position in the recorder file, from 0; -1 for a record found in flight in a dead process."""
    state: State
    trace_id: str
    span_id: str
    parent_span_id: str
    """Empty where the request brought no trace."""
    internal: bool
    """True where the app already had a span around us (then ours is INTERNAL, else SERVER)."""
    sampled: bool
    """The sampled flag of the incoming `traceparent`; True where there was none."""
    run_id: str
    """The load run that sent it (W3C baggage `stagescope.run`); empty outside load runs."""
    start_ns: int
    duration_ns: int
    method: str
    path: str
    """Without the query string; cut after 128 bytes."""
    route: str
    status: int
    """0 where no response was started."""
    error: str
    """Class name of the exception that ended it, `disconnect`, `incomplete`, or empty."""
    request_bytes: int
    response_bytes: int
    first_byte_ns: int
    """Since start_ns, when the first body byte had been handed over; 0 if none was."""
    send_wait_ns: int
    """Time in which the server waited for the client to take bytes."""
    chunks: int
    stages: tuple[StageSpan, ...]
    batch_ids: tuple[str, ...]
    stages_dropped: int
    """Openings that found no room; their time stays with the stage around them."""
    nested: bool = False
    """True where the app's own spans hang under those of this request, and miss them if dropped."""
    chunk_gaps: int = 0
    """Times between a chunk of the body that held bytes and the next one: between tokens, where a
    model streams them. A stream has one less than such chunks."""
    chunk_gap_sum_ns: int = 0
    chunk_gap_max_ns: int = 0
    stalls: tuple[StageStall, ...] = ()
    """What stages were charged while the process stood still, or was profiled; docs/waits.md."""
    wait_facts: tuple[WaitFact, ...] = ()
    """Of requests of a load run: when they ran on the event loop and waited for it."""

    @property
    def profiled(self) -> bool:
        """True where a capture was at work meanwhile: its times are no longer the server's own."""
        return any(stall.cause == CAPTURE for stall in self.stalls)

    def self_ns(self) -> dict[str, int]:
        """Return nanoseconds by full stage name, `other` included; the values sum to duration_ns."""
        sums: dict[str, int] = {}
        claimed = 0
        for span in self.stages:
            sums[span.stage] = sums.get(span.stage, 0) + span.self_ns
            claimed += span.self_ns
        sums[OTHER] = sums.get(OTHER, 0) + self.duration_ns - claimed
        return sums

    def stage_ns(self) -> dict[str, int]:
        """Return nanoseconds by stage, sub-stages added to their stage; sums to duration_ns."""
        sums: dict[str, int] = {}
        for name, spent in self.self_ns().items():
            stage = stage_of(name)
            sums[stage] = sums.get(stage, 0) + spent
        return sums


@dataclass(frozen=True, slots=True)
class Member:
    """One request of a batch, by its ids."""

    trace_id: str
    span_id: str


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """One batch: a span of its own, with links to all its members."""

    process: Process
    seq: int
    state: State
    batch_id: str
    """16 hex digits; also the span id of the batch's span."""
    trace_id: str
    """A trace of the batch's own, never the first member's."""
    model: str
    start_ns: int
    """When the worker was free and the first member was there."""
    duration_ns: int
    error: str
    size: int
    """Members, also where `members` lists fewer (see members_dropped)."""
    members: tuple[Member, ...]
    members_dropped: int
    device_ns: int
    """Device time of the whole batch; 0 where it was not measured."""
    stages: tuple[StageSpan, ...]
    run_id: str
    """The load run of its members; empty where they have none or several."""


@dataclass(frozen=True, slots=True)
class ColdStartRecord:
    """One start of a served process, until its first request was answered: a trace of its own."""

    process: Process
    seq: int
    """As in RequestRecord."""
    state: State
    """`DIED` where the process ended before; its last open stage is where it died."""
    trace_id: str
    span_id: str
    start_ns: int
    """When the kernel started the process; early by up to a clock tick (10 ms on Linux)."""
    duration_ns: int
    """Until the last byte of the first response; until the app's end where there was no request."""
    error: str
    """`startup failed`, or empty."""
    first_request: Member | None
    """The first request; None where there was none."""
    stages: tuple[StageSpan, ...]
    """The parts of COLD_START_PARTS, in this order, with loads and the user's stages in them."""
    stages_dropped: int
    run_id: str = ""
    """Always empty: no load run asks for a start."""

    def ready_ns(self) -> int | None:
        """Return how long it took until the app could serve; None where it never could."""
        served = [span.start_ns for span in self.stages if span.stage in (IDLE, FIRST_REQUEST)]
        return min(served, default=None)


Record = RequestRecord | BatchRecord | ColdStartRecord


def last_stage(record: Record) -> str:
    """Return the stage that was charged at the record's end: for a death, the one it died in.

    That is the stage opened last of those still open; `other` where none was.
    """
    last = opened_last([span for span in record.stages if span.open])
    return last.stage if last else OTHER
