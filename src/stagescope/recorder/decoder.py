"""Turns the bytes of one slot, with the slots chained to it, into a record."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from struct import Struct
from typing import NamedTuple

from stagescope.recorder import format as fmt
from stagescope.records import (
    Anchor,
    BatchRecord,
    ColdStartRecord,
    Member,
    Process,
    Record,
    RequestRecord,
    State,
)
from stagescope.stages import CAPTURE, OTHER, StageSpan, Stall, WaitFact, partition, stage_of

_HEAD = Struct(
    f"<{fmt.OPENED_AT}x"
    + fmt.OPENED.format.lstrip("<")
    + fmt.FINISHED.format.lstrip("<")
    + fmt.GAPS.format.lstrip("<")
)


class _Head(NamedTuple):
    """What `_HEAD` reads: of a batch `path` is the model, `n1` its device time, `chunks` its size."""

    kind: int
    state: int
    flags: int
    reserved: int
    chain_index: int
    start: int
    trace: bytes
    span: bytes
    parent: bytes
    run: bytes
    method: bytes
    path: bytes
    duration: int
    n1: int
    n2: int
    first_byte: int
    send_wait: int
    chunks: int
    dropped: int
    status: int
    continuations: int
    reserved_2: int
    error: bytes
    route: bytes
    gaps: int
    gap_sum: int
    gap_max: int

    def can_be(self, anchor: Anchor) -> bool:
        """Return whether its times are times and its counts are counts."""
        times = self.start | self.duration | self.n1 | self.n2 | self.first_byte | self.send_wait
        return not (
            (times | self.gap_sum | self.gap_max) >> 62
            or (self.chunks | self.dropped | self.gaps) >> 30
            or self.status > _MAX_STATUS
            or not 0 < self.state <= fmt.STATE_FINISHED
            or abs(self.start - anchor.monotonic_ns) > _FAR_NS
            or not 0 <= anchor.wall(self.start) < _LAST_NS - self.duration
            or (self.trace == _NO_TRACE and self.kind == fmt.KIND_REQUEST)
        )


_KEY = slice(fmt.OPENED_AT + 32, fmt.OPENED_AT + 40)
_CHAIN_INDEX = slice(fmt.OPENED_AT + 4, fmt.OPENED_AT + 8)
_CODES = tuple(Struct(f"<{many}H") for many in range(fmt.ENTRIES_PER_SLOT + 1))
_TIMES = tuple(Struct(f"<{many}Q") for many in range(fmt.ENTRIES_PER_SLOT + 1))
_NO_PARENT = bytes(8)
_NO_TRACE = bytes(16)
_MAX_STATUS = 999
_LAST_NS = 1 << 63
_FAR_NS = 1 << 57
"""Four and a half years; the anchor is never older than the process."""

_MAX_ORPHANS = 4096
_MAX_TEXTS = 1024
_MAX_STALLS = 256
_MAX_CAPTURES = 16

Entries = list[tuple[int, int, int]]
"""(code, start, end) as they stand in a slot."""


class Chains:
    """Slots that continue a timeline, kept by the span id of their owner until it comes."""

    def __init__(self) -> None:
        self._slots: dict[bytes, list[tuple[int, bytes]]] = {}
        self._first_seq: dict[bytes, int] = {}

    def __bool__(self) -> bool:
        return bool(self._slots)

    def take(self, slot: bytes, seq: int = -1) -> bool:
        """Keep *slot* if it continues another; False where it is a record of its own."""
        if slot[fmt.OPENED_AT] != fmt.KIND_CHAIN:
            return False
        if len(self._slots) >= _MAX_ORPHANS:
            # Owners that never came: their timelines were overwritten. The oldest goes.
            self.entries(next(iter(self._slots)))
        index = int.from_bytes(slot[_CHAIN_INDEX], "little")
        self._slots.setdefault(slot[_KEY], []).append((index, slot))
        self._first_seq.setdefault(slot[_KEY], seq)
        return True

    def first_seq(self, default: int) -> int:
        """Return the earliest slot that is kept here; *default* where there is none."""
        return min(self._first_seq.values(), default=default)

    def entries(self, owner: bytes) -> tuple[Entries, int]:
        """Return, and forget, what continues the timeline of *owner*: entries, and own slots."""
        self._first_seq.pop(owner, None)
        chained = sorted(self._slots.pop(owner, ()))
        own = sum(index < fmt.MAX_CHAIN for index, _ in chained)
        return [entry for _, slot in chained for entry in entries_of(slot)], own


def entries_of(slot: bytes) -> Entries:
    """Return the entries of a slot, those that were reserved and never written left out."""
    used = (len(slot[fmt.CODES_AT : fmt.STARTS_AT].rstrip(b"\0")) + 1) // 2
    return list(
        zip(
            _CODES[used].unpack_from(slot, fmt.CODES_AT),
            _TIMES[used].unpack_from(slot, fmt.STARTS_AT),
            _TIMES[used].unpack_from(slot, fmt.ENDS_AT),
            strict=True,
        )
    )


class SlotDecoder:
    """Decodes slots of one file; knows its table of stage names, which only grows."""

    def __init__(self, read: Callable[[int, int], bytes], capacity: int) -> None:
        """*read* reads so many bytes of the file at an offset."""
        self.damaged = 0
        """Records that were refused, since a number in them can't be."""
        self._read_file = read
        self._capacity = capacity
        self._names = [OTHER, OTHER]
        self._texts: dict[bytes, str] = {}
        self._stalls: deque[Stall] = deque(maxlen=_MAX_STALLS)
        self._captures: dict[int, Stall] = {}

    def name(self, code: int) -> str:
        """Return the stage name of *code*; `other` where the table does not hold it."""
        if code > self._capacity - fmt.BORROWED_NAMES:
            return self._read(code) or OTHER if code <= self._capacity else OTHER
        if code >= len(self._names):
            self._grow()
        return self._names[code] if code < len(self._names) else OTHER

    def _grow(self) -> None:
        while len(self._names) <= self._capacity - fmt.BORROWED_NAMES:
            text = self._read(len(self._names))
            if not text:
                return
            self._names.append(text)

    def _read(self, code: int) -> str:
        entry = self._read_file(fmt.NAMES_AT + (code - 1) * fmt.NAME_BYTES, fmt.NAME_BYTES)
        length = entry[0]
        if not 0 < length < fmt.NAME_BYTES:
            return ""
        return entry[1 : 1 + length].decode("utf-8", "replace")

    @property
    def stalls(self) -> list[Stall]:
        """The newest stalls of the process that were read, captures among them."""
        return [*self._captures.values(), *self._stalls]

    def _keep_stall(self, stall: Stall) -> None:
        if stall.cause != CAPTURE:
            self._stalls.append(stall)
            return
        # Told when it begins, with the latest end that it may have, and again when it has ended:
        # so the requests that end meanwhile, and are read meanwhile, are known for profiled.
        self._captures[stall.start_ns] = stall
        if len(self._captures) > _MAX_CAPTURES:
            del self._captures[min(self._captures)]

    def decode(
        self, slot: bytes, process: Process, seq: int, chains: Chains, *, now_ns: int = 0
    ) -> Record | None:
        """Return the record in *slot*; None where it continues another, or is of no known kind.

        None also where it is damaged (see `damaged`): what reads it further on must be able to
        trust that its times are times and its counts are counts.

        *now_ns* (monotonic) ends what is still open; without it the recorded duration does.
        """
        if chains.take(slot, seq):
            return None
        head = _Head._make(_HEAD.unpack_from(slot))
        if not head.can_be(process.anchor):
            chains.entries(head.span)
            self.damaged += 1
            return None
        state = State.FINISHED if head.state == fmt.STATE_FINISHED else State.DIED
        duration = head.duration if state is State.FINISHED else max(0, now_ns - head.start)
        entries, dropped, own = entries_of(slot), head.dropped, 0
        if chains:
            further, own = chains.entries(head.span)
            entries += further
        if head.continuations > own and state is State.FINISHED:
            # The oldest of its slots were written over before they could be read.
            dropped += (head.continuations - own) * fmt.ENTRIES_PER_SLOT
        if head.kind == fmt.KIND_REQUEST:
            return self._request(head, process, seq, state, duration, entries, dropped)
        if head.kind == fmt.KIND_BATCH:
            return self._batch(head, process, seq, state, duration, entries)
        if head.kind == fmt.KIND_COLD_START:
            return self._cold_start(head, process, seq, state, duration, entries, dropped)
        if head.kind == fmt.KIND_STALL:
            self._keep_stall(Stall(self._text(head.method), head.start, head.start + duration))
        return None

    def _request(
        self, head: _Head, process: Process, seq: int, state: State, duration: int,
        entries: Entries, dropped: int,
    ) -> RequestRecord:  # fmt: skip
        text, flags, parent = self._text, head.flags, head.parent
        stages, batches, facts = self._request_entries(entries, head.start, duration)
        if state is State.FINISHED and seq < 0:
            # Killed between the end of the record and that of its response.
            stages = tuple([
                span._replace(open=False) if stage_of(span.stage) == "respond" else span
                for span in stages
            ])  # fmt: skip
        return RequestRecord(
            process, seq, state, head.trace.hex(), head.span.hex(),
            parent.hex() if parent != _NO_PARENT else "", bool(flags & fmt.FLAG_INTERNAL),
            bool(flags & fmt.FLAG_SAMPLED), text(head.run), head.start, duration,
            text(head.method), text(head.path), text(head.route), head.status, text(head.error),
            head.n1, head.n2, head.first_byte, head.send_wait, head.chunks, stages, batches,
            dropped, bool(flags & fmt.FLAG_NESTED), head.gaps, head.gap_sum, head.gap_max,
            wait_facts=facts,
        )  # fmt: skip

    def _batch(
        self, head: _Head, process: Process, seq: int, state: State, duration: int, entries: Entries
    ) -> BatchRecord:
        text = self._text
        intervals, members = _batch_entries(entries)
        return BatchRecord(
            process, seq, state, head.span.hex(), head.trace.hex(), text(head.path), head.start,
            duration, text(head.error), head.chunks or len(members), members,
            max(0, head.chunks - len(members)), head.n1,
            self._stages(intervals, head.start, duration), text(head.run),
        )  # fmt: skip

    def _cold_start(
        self, head: _Head, process: Process, seq: int, state: State, duration: int,
        entries: Entries, dropped: int,
    ) -> ColdStartRecord:  # fmt: skip
        intervals, members = _batch_entries(entries)
        return ColdStartRecord(
            process, seq, state, head.trace.hex(), head.span.hex(), head.start, duration,
            self._text(head.error), members[0] if members else None,
            self._stages(intervals, head.start, duration), dropped,
        )  # fmt: skip

    def _request_entries(
        self, entries: Entries, start: int, duration: int
    ) -> tuple[tuple[StageSpan, ...], tuple[str, ...], tuple[WaitFact, ...]]:
        # A start of 0: the process was killed, or the timeline ended, while it was being written.
        intervals = [entry for entry in entries if 0 < entry[0] < fmt.CODE_SPECIAL and entry[1]]
        batches: tuple[str, ...] = ()
        facts: tuple[WaitFact, ...] = ()
        if len(intervals) < len(entries):
            facts = _wait_facts(entries, start, duration)
            batches = tuple(f"{at:016x}" for code, at, _ in entries if code == fmt.CODE_BATCH)
        return self._stages(intervals, start, duration), batches, facts

    def _stages(self, intervals: Entries, start: int, duration: int) -> tuple[StageSpan, ...]:
        # Threads may write out of order; sorting by start is stable, so ties stay as written.
        intervals.sort(key=_start)
        at, last = start, start + duration
        for _, opened, closed in intervals:
            if not at <= opened <= closed <= last:
                return self._overlapping_stages(intervals, start, duration)
            at = closed
        # One after the other, as most are: `partition` charges each its length.
        name, failed = self.name, fmt.CODE_FAILED
        return tuple(
            [
                StageSpan(
                    name(code & ~failed), opened - start, closed - start, closed - opened,
                    code >= failed,
                )
                for code, opened, closed in intervals
            ]
        )  # fmt: skip

    def _overlapping_stages(
        self, intervals: Entries, start: int, duration: int
    ) -> tuple[StageSpan, ...]:
        times: list[tuple[int, int]] = []
        for _, opened, closed in intervals:
            at = _within(opened - start, duration)
            times.append((at, max(at, _within(closed - start, duration)) if closed else duration))
        charged, _ = partition(times, duration)
        name = self.name
        return tuple(
            [
                StageSpan(
                    name(code & ~fmt.CODE_FAILED), opened, closed, self_ns,
                    code >= fmt.CODE_FAILED, not end,
                )
                for (code, _, end), (opened, closed), self_ns in zip(
                    intervals, times, charged, strict=True
                )
            ]
        )  # fmt: skip

    def _text(self, padded: bytes) -> str:
        """Return the text of a padded field; the same few paths and routes come again and again."""
        known = self._texts.get(padded)
        if known is None:
            if len(self._texts) >= _MAX_TEXTS:
                self._texts.clear()
            known = self._texts[padded] = padded.rstrip(b"\0").decode("utf-8", "replace")
        return known


_LONG_NS = 60_000_000_000
"""What a fact begins before its request is a wait; a longer one is damage."""
_WAIT_BLOCKS = {
    fmt.CODE_RAN: "ran",
    fmt.CODE_READY: "ready",
    fmt.CODE_DUE: "due",
    fmt.CODE_AWAITED: "awaited",
    fmt.CODE_THREAD: "thread",
    fmt.CODE_QUEUED: "queued",
    fmt.CODE_BUSY: "busy",
}
_WAIT_KINDS: dict[int, tuple[str, int]] = {
    first + number: (kind, number)
    for first, kind in _WAIT_BLOCKS.items()
    for number in range(fmt.LOOPS)
    if first + number < fmt.CODE_MEMBER_TRACE
} | {fmt.CODE_OFF + at: ("off", times) for at, times in enumerate(fmt.TIMES_ON_CORE)}
"""What a fact's code says: its kind, and its number."""


def _wait_facts(entries: Entries, start: int, duration: int) -> tuple[WaitFact, ...]:
    """Return the facts among *entries* whose times lie within the timeline."""
    return tuple(
        [
            WaitFact(*_WAIT_KINDS[code], first - start, last - start)
            for code, first, last in entries
            if code in _WAIT_KINDS and start - _LONG_NS < first <= last <= start + duration
        ]
    )


def _start(entry: tuple[int, int, int]) -> int:
    return entry[1]


def _within(at: int, duration: int) -> int:
    """Clamp a time to the timeline: what outlived its request is charged until its end."""
    return 0 if at < 0 else at if at < duration else duration


def _batch_entries(entries: Entries) -> tuple[Entries, tuple[Member, ...]]:
    """Split a batch's entries into its stages and its members."""
    intervals: Entries = []
    members: list[Member] = []
    for code, first, second in entries:
        if code == fmt.CODE_MEMBER:
            members.append(Member(f"{0:016x}{second:016x}", f"{first:016x}"))
        elif code == fmt.CODE_MEMBER_TRACE and members:
            last = members.pop()
            members.append(Member(f"{first:016x}{last.trace_id[16:]}", last.span_id))
        elif 0 < code < fmt.CODE_SPECIAL and first:
            intervals.append((code, first, second))
    return intervals, tuple(members)
