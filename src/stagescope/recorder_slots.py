"""Turns the bytes of one slot, with the slots chained to it, into a record."""

from __future__ import annotations

from collections.abc import Sequence
from struct import Struct

from stagescope import recorder_format as fmt
from stagescope.records import BatchRecord, Member, Process, Record, RequestRecord, State
from stagescope.stages import OTHER, StageSpan, partition

_HEAD = Struct(
    f"<{fmt.OPENED_AT}x" + fmt.OPENED.format.lstrip("<") + fmt.FINISHED.format.lstrip("<")
)
_KEY = slice(fmt.OPENED_AT + 32, fmt.OPENED_AT + 40)
_CHAIN_INDEX = slice(fmt.OPENED_AT + 4, fmt.OPENED_AT + 8)
_PAIRS = tuple(Struct(f"<{2 * n}Q") for n in range(fmt.ENTRIES_PER_SLOT + 1))
_MAX_ORPHANS = 4096

Entries = list[tuple[int, int]]


class Chains:
    """Slots that continue a timeline, kept by the span id of their owner until it comes."""

    def __init__(self) -> None:
        self._slots: dict[bytes, list[tuple[int, bytes]]] = {}

    def take(self, slot: bytes) -> bool:
        """Keep *slot* if it continues another; False where it is a record of its own."""
        if slot[fmt.OPENED_AT] != fmt.KIND_CHAIN:
            return False
        if len(self._slots) >= _MAX_ORPHANS:
            # Owners that never came: their timelines were overwritten. The oldest goes.
            self._slots.pop(next(iter(self._slots)))
        index = int.from_bytes(slot[_CHAIN_INDEX], "little")
        self._slots.setdefault(slot[_KEY], []).append((index, slot))
        return True

    def entries(self, owner: bytes) -> Entries:
        """Give, and forget, the entries that continue the timeline of *owner*."""
        chained = sorted(self._slots.pop(owner, ()))
        return [pair for _, slot in chained for pair in pairs_of(slot)]


def pairs_of(slot: bytes) -> Entries:
    """Give the pairs of a slot as far as they are used."""
    words = _PAIRS[fmt.ENTRIES_PER_SLOT].unpack_from(slot, fmt.ENTRIES_AT)
    used = fmt.ENTRIES_PER_SLOT * 2
    while used and not words[used - 2] and not words[used - 1]:
        used -= 2
    return list(zip(words[:used:2], words[1:used:2], strict=True))


class SlotDecoder:
    """Decodes slots of one file; knows its table of stage names, which only grows."""

    def __init__(self, file: memoryview, capacity: int) -> None:
        self._file = file
        self._capacity = capacity
        self._names = [OTHER, OTHER]

    def close(self) -> None:
        """Let go of the file's memory."""
        self._file = memoryview(b"")

    def name(self, code: int) -> str:
        """Give the stage name of *code*; `other` where the table does not hold it."""
        if code >= len(self._names):
            self._grow()
        return self._names[code] if code < len(self._names) else OTHER

    def _grow(self) -> None:
        while len(self._names) <= self._capacity:
            at = fmt.NAMES_AT + (len(self._names) - 1) * fmt.NAME_BYTES
            length = self._file[at]
            if not 0 < length < fmt.NAME_BYTES:
                return
            text = bytes(self._file[at + 1 : at + 1 + length]).decode("utf-8", "replace")
            self._names.append(text)

    def decode(
        self, slot: bytes, process: Process, seq: int, chains: Chains, *, now_ns: int = 0
    ) -> Record | None:
        """Give the record in *slot*; None where it continues another, or is of no known kind.

        *now_ns* (monotonic) ends what is still open; without it the recorded duration does.
        """
        if chains.take(slot):
            return None
        (kind, state, flags, _, _, start, trace, span, parent, run, method, path,
         duration, n1, n2, first_byte, send_wait, chunks, dropped, status, _, _, error,
         route) = _HEAD.unpack_from(slot)  # fmt: skip
        finished = state == fmt.STATE_FINISHED
        if not finished:
            duration = max(0, now_ns - start)
        entries = pairs_of(slot)
        if len(entries) == fmt.ENTRIES_PER_SLOT:
            entries += chains.entries(span)
        if kind == fmt.KIND_REQUEST:
            stages, batches = self._request_entries(entries, duration)
            return RequestRecord(
                process, seq, State.FINISHED if finished else State.DIED, trace.hex(), span.hex(),
                parent.hex() if any(parent) else "", bool(flags & fmt.FLAG_INTERNAL),
                bool(flags & fmt.FLAG_SAMPLED), _text(run), start, duration, _text(method),
                _text(path), _text(route), status, _text(error), n1, n2, first_byte, send_wait,
                chunks, stages, batches, dropped,
            )  # fmt: skip
        if kind == fmt.KIND_BATCH:
            intervals, members = _batch_entries(entries)
            return BatchRecord(
                process, seq, State.FINISHED if finished else State.DIED, span.hex(), trace.hex(),
                _text(path), start, duration, _text(error), chunks or len(members), members,
                max(0, chunks - len(members)), n1, self._stages(intervals, duration), _text(run),
            )  # fmt: skip
        return None

    def _request_entries(
        self, entries: Entries, duration: int
    ) -> tuple[tuple[StageSpan, ...], tuple[str, ...]]:
        batches = tuple(f"{w2:016x}" for w1, w2 in entries if w1 & fmt.CODE_MASK == fmt.CODE_BATCH)
        intervals = [(w1, w2) for w1, w2 in entries if 0 < w1 & fmt.CODE_MASK < fmt.CODE_MEMBER]
        return self._stages(intervals, duration), batches

    def _stages(self, intervals: Entries, duration: int) -> tuple[StageSpan, ...]:
        # Threads may write out of order; sorting by start is stable, so ties stay as written.
        intervals.sort(key=_start)
        times = [
            (w1 >> fmt.CODE_BITS, w2 >> fmt.CODE_BITS if w2 else duration) for w1, w2 in intervals
        ]
        charged, _ = partition(times, duration)
        return tuple(
            [
                StageSpan(
                    self.name(w1 & fmt.CODE_MASK),
                    start if start < duration else duration,
                    end if end < duration else duration,
                    self_ns,
                    bool(w2 & fmt.FAILED),
                    not w2,
                )
                for (w1, w2), (start, end), self_ns in zip(intervals, times, charged, strict=True)
            ]
        )


def _start(entry: tuple[int, int]) -> int:
    return entry[0] >> fmt.CODE_BITS


def _batch_entries(entries: Entries) -> tuple[Entries, tuple[Member, ...]]:
    """Split a batch's entries into its stages and its members."""
    intervals: Entries = []
    members: list[Member] = []
    pairs: Sequence[tuple[int, int]] = entries
    index = 0
    while index < len(pairs):
        w1, w2 = pairs[index]
        code = w1 & fmt.CODE_MASK
        index += 1
        if code == fmt.CODE_MEMBER and index < len(pairs):
            high, low = pairs[index]
            members.append(Member(f"{high:016x}{low:016x}", f"{w2:016x}"))
            index += 1
        elif 0 < code < fmt.CODE_MEMBER:
            intervals.append((w1, w2))
    return intervals, tuple(members)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode("utf-8", "replace")
