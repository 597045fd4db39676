"""What travels: one finished request or batch, as the server wrote it, read back.

All times are nanoseconds on the monotonic clock of the process's host, unless a name says `wall`.
Ids are lower-case hex, as in W3C Trace Context: 32 digits a trace, 16 a span.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

from stagescope.columns import RUN_CLOCKS, column
from stagescope.stages import (
    CAPTURE,
    FIRST_REQUEST,
    IDLE,
    OTHER,
    StageSpan,
    StageStall,
    Stall,
    WaitFact,
    opened_last,
    overlap,
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

    ring_id: str = field(
        metadata=column(
            "the process that wrote it (`service.instance.id`): 32 hex digits, new for each "
            "recorder file"
        )
    )
    pid: int = field(metadata=column("process id on its host"))
    service: str = field(metadata=column("service name"))
    host: str = field(metadata=column("host name"))
    boot_id: str = field(metadata=column("equal to the client's: one monotonic clock serves both"))
    anchor: Anchor
    cost: InstrumentCost
    version: str
    """The stagescope that wrote."""
    python: str


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """One request: its identity, its outcome and its timeline."""

    process: Process
    seq: int = field(
        metadata=column("position in that process's recorder file, from 0; -1: it died in flight")
    )
    state: State = field(metadata=column("`finished` or `died`"))
    trace_id: str = field(metadata=column("joins `client.trace_id`"))
    span_id: str = field(metadata=column("the server's span"))
    parent_span_id: str = field(
        metadata=column("joins `client.span_id`; empty where the request brought no trace")
    )
    internal: bool
    """True where the app already had a span around us (then ours is INTERNAL, else SERVER)."""
    sampled: bool
    """The sampled flag of the incoming `traceparent`; True where there was none."""
    run_id: str
    """The load run that sent it (W3C baggage `stagescope.run`); empty outside load runs."""
    start_ns: int = field(metadata=column(f"when the middleware first saw it; {RUN_CLOCKS}"))
    duration_ns: int = field(metadata=column("until the last byte was handed over"))
    method: str = field(metadata=column("HTTP method"))
    path: str = field(metadata=column("without query string, at most 128 bytes"))
    route: str = field(metadata=column("route template where known, else empty"))
    status: int = field(metadata=column("HTTP status; 0 where no response was started", small=True))
    error: str = field(
        metadata=column("class name of the exception, `disconnect`, `incomplete`, or empty")
    )
    request_bytes: int = field(metadata=column("body bytes read"))
    response_bytes: int = field(metadata=column("body bytes written"))
    first_byte_ns: int = field(
        metadata=column(
            "since start_ns, when the first body byte had been handed over; 0 where none was"
        )
    )
    send_wait_ns: int = field(metadata=column("waiting for the client to take bytes"))
    chunks: int = field(metadata=column("body messages written", small=True))
    stages: tuple[StageSpan, ...] = field(
        metadata=column("every opening of a stage, by full name, with what it is charged")
    )
    batch_ids: tuple[str, ...] = field(metadata=column("batches that it was a member of"))
    stages_dropped: int = field(
        metadata=column(
            "openings that found no room in the record; their time stays with the stage around",
            small=True,
        )
    )
    nested: bool = False
    """True where the app's own spans hang under those of this request, and miss them if dropped."""
    chunk_gaps: int = field(
        default=0,
        metadata=column("times between one body chunk with bytes and the next", small=True),
    )
    chunk_gap_sum_ns: int = field(
        default=0,
        metadata=column(
            "their sum; divided by chunk_gaps, the mean time between chunks, or tokens"
        ),
    )
    chunk_gap_max_ns: int = field(default=0, metadata=column("the longest of them"))
    stalls: tuple[StageStall, ...] = field(
        default=(),
        metadata=column(
            "what its stages, and `other`, were charged while the process stood still, by cause: "
            "`loop`, `gc`, `stopped`, `capture`; null: not known"
        ),
    )
    wait_facts: tuple[WaitFact, ...] = field(
        default=(),
        metadata=column(
            "when it ran on the event loop (`ran`), waited for it (`ready`, `due`), awaited "
            "something else (`awaited`), a thread worked for it (`thread`) or was not on a core "
            "(`queued`, `off`), when the loop was `busy` with code of no request, and when its "
            "process stood still (`gc`, `stopped`); null: not known; see "
            "waits.md"
        ),
    )

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
    seq: int = field(metadata=column("position in that process's recorder file"))
    state: State = field(metadata=column("`finished` or `died`"))
    batch_id: str = field(
        metadata=column("16 hex digits, the id of the batch's span; joins `server.batch_ids`")
    )
    trace_id: str = field(metadata=column("the batch's own trace, never a member's"))
    model: str = field(metadata=column("model name, where given"))
    start_ns: int = field(
        metadata=column(f"when the worker was free and the first member there; {RUN_CLOCKS}")
    )
    duration_ns: int = field(metadata=column("until the batch was done"))
    error: str = field(metadata=column("class name of the exception, or empty"))
    size: int = field(metadata=column("members, also where `members` lists fewer", small=True))
    members: tuple[Member, ...] = field(metadata=column("ids of the members"))
    members_dropped: int
    """Members that the record had no room to name."""
    device_ns: int = field(
        metadata=column("device time of the whole batch; 0 where it was not measured")
    )
    stages: tuple[StageSpan, ...] = field(metadata=column("the batch's own stages"))
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


SENT_BEFORE_NS = 1_000_000_000
"""A request that begins so soon after its process was stopped may have been sent meanwhile."""


def with_stalls(record: RequestRecord, stalls: Sequence[Stall]) -> RequestRecord:
    """Return *record* with what its stages were charged during *stalls* of its process."""
    first_ns, last_ns = record.start_ns, record.start_ns + record.duration_ns
    met = [stall for stall in stalls if stall.end_ns > first_ns and stall.start_ns < last_ns]
    # A request of a load run keeps the times themselves: they tell its waits apart. Also of a stop
    # just before it: nobody may have been in flight, and only the client knows when it sent.
    pauses = tuple(
        [
            WaitFact(stall.cause, -1, stall.start_ns - first_ns, stall.end_ns - first_ns)
            for stall in stalls
            if record.run_id
            and stall.start_ns < last_ns
            and (
                (stall.cause == "gc" and stall.end_ns > first_ns)
                or (stall.cause == "stopped" and stall.end_ns > first_ns - SENT_BEFORE_NS)
            )
        ]
    )
    if not met and not pauses:
        return record
    return replace(
        record,
        stalls=overlap(met, first_ns, record.duration_ns, record.stages),
        wait_facts=record.wait_facts + pauses,
    )
