"""The recorder file's format, version 1: offsets, sizes and codes; docs/recorder-format.md tells it.

Writer (`stagescope.middleware`) and reader (`stagescope.recorder.reader`) share this and nothing
else. Little-endian throughout. A file is: header, table of stage names, in-flight slots, ring.
"""

from __future__ import annotations

from struct import Struct

MAGIC = b"STGSCOPE"
VERSION = 1
SUFFIX = ".ring"

# --- header -------------------------------------------------------------------------------------
HEADER = Struct("<8sHHIIIIIQII16s40s64s128s24s24s")
"""magic, version, reserved, data offset, slot bytes, in-flight slots, ring slots, name capacity,
file bytes, pid, reserved, ring id, boot id, host, service, stagescope version, Python version."""
HEADER_CRC_AT = HEADER.size
"""crc32 (u32) of the bytes before it: they never change once the file has its name."""

LIVE_WORD = 64
"""Words (u64, counted from the file's start) that change while the process lives begin here."""
ANCHOR_COUNT_WORD = LIVE_WORD
"""How many anchors were written; the newest is pair (count - 1) % 2 of the two that follow."""
ANCHOR_WORDS = LIVE_WORD + 1
"""Two pairs of (monotonic ns, wall ns)."""
COST_BASE_WORD = LIVE_WORD + 5
COST_STAGE_WORD = LIVE_WORD + 6
COUNTER_WORDS = LIVE_WORD + 8
COUNTERS = (
    "faults", "unlisted", "names_refused", "chains_refused", "stale_writes", "files_swept",
)  # fmt: skip
"""Counters of the writer's: guarded faults, requests that found no in-flight slot, stage names
refused, timelines that outgrew their slots, writes to a timeline already finished, recorder files
of dead processes that were deleted unread when this one was made."""
WAIT_WORDS = LIVE_WORD + 24
WAITS = (
    "loop_ticks", "loop_lag_ns", "loop_lag_max_ns", "pool_threads", "pool_busy", "pool_waiting",
    "pool_waiting_max", "gc_pauses", "gc_pause_ns", "gc_pause_max_ns", "watch_cost_ns",
    "gil_ticks", "gil_wait_ns", "gil_wait_max_ns", "gil_cost_ns", "pool_busy_ns",
)  # fmt: skip
"""Waits of the whole process: readings of the event loop's timer (10/s), by how much they came
late (sum, most); worker threads there are, busy and waited for at the last reading, and the most
that were waited for at any; pauses of the garbage collector (count, sum, most); what the timer
cost; readings of the wait for the interpreter's lock, an estimate (count, sum, most, cost)."""

NAMES_AT = 1024
NAME_BYTES = 64
NAME_CAPACITY = 256
BORROWED_NAMES = 64
"""The table's last entries: names of other processes that write into lent slots, from the back."""
DATA_AT = 20480
"""Names end at 17408; the slots begin on the next page."""

# --- slots --------------------------------------------------------------------------------------
SLOT_BYTES = 1024
SLOT_WORDS = SLOT_BYTES // 8
IN_FLIGHT_SLOTS = 512
RING_SLOTS = 8192

BEGIN_WORD = 0
"""seq + 1 of a committed ring slot; 0 while it is empty or being written."""
COMMIT_WORD = 1
"""In an in-flight slot: seq + 1 of the ring slot that it is being copied to; else 0."""

OPENED = Struct("<BBBBIQ16s8s8s40s8s128s")
"""From OPENED_AT, written when the timeline opens: kind, state, flags, reserved, chain index,
start (monotonic ns), trace id, span id, parent span id, run id, method, path (a batch: model)."""
OPENED_AT = 16
STATE_AT = 17
FLAGS_AT = 18
FINISHED = Struct("<QQQQQIIHHI40s92s")
"""From FINISHED_AT, written when it ends: duration ns, request bytes (a batch: device ns),
response bytes, first byte ns, send wait ns, chunks (a batch: size), entries dropped,
status, continuations, reserved, error, route."""
FINISHED_AT = OPENED_AT + OPENED.size
GAPS = Struct("<IQQ")
"""From GAPS_AT, written when it ends where the body went out in several chunks, else 0: times from
one chunk to the next, how many, their sum ns, the longest ns."""
GAPS_AT = FINISHED_AT + FINISHED.size
ENTRIES_AT = 448
ENTRIES_PER_SLOT = 32
"""An entry is a code, a start and an end, kept in three arrays one behind the other."""
CODES_AT = ENTRIES_AT
"""u16 codes; 0: unused."""
STARTS_AT = CODES_AT + 2 * ENTRIES_PER_SLOT
"""u64 starts, monotonic ns."""
ENDS_AT = STARTS_AT + 8 * ENTRIES_PER_SLOT
"""u64 ends, monotonic ns; 0: still open."""
MAX_CHAIN = 64
"""Slots that one timeline may fill, its first included."""

KIND_REQUEST, KIND_BATCH, KIND_CHAIN, KIND_COLD_START, KIND_STALL = 1, 2, 3, 4, 5
STATE_FREE, STATE_OPEN, STATE_FINISHED = 0, 1, 2
FLAG_INTERNAL, FLAG_SAMPLED, FLAG_NESTED = 1, 2, 4
"""A span is around ours or makes the SERVER span; the trace is sampled; the app's own spans hang
under those of this request."""

# --- codes of entries ---------------------------------------------------------------------------
CODE_UNUSED = 0
CODE_OTHER = 1
"""Code n is entry n - 1 of the table of names; the first of them is `other`."""
CODE_FAILED = 0x8000
"""Added to the code of a stage that was left by an exception."""
CODE_SPECIAL = 0xFF00
"""From here on an entry is no stage."""
CODE_BATCH = 0xFFFF
"""A request joined a batch: start = batch id, end = when."""
CODE_MEMBER = 0xFFFE
"""A batch's member, or the first request of a cold start: start = its span id, end = low half of its trace id."""
CODE_MEMBER_TRACE = 0xFFFD
"""The high half of the trace id of the member before it: start."""
LOOPS = 32
"""To each of the codes below the event loop's number, 0 to 28, is added."""
CODE_RAN = 0xFF00
"""The request ran on the event loop, from start to end (monotonic ns, as in all of these)."""
CODE_READY = 0xFF20
"""It could go on at start, and the loop resumed it at end."""
CODE_DUE = 0xFF40
"""The timer that it awaited was due at start, and the loop resumed it at end."""
CODE_AWAITED = 0xFF60
"""It awaited something from start to end; when within that it was ready is not known."""
CODE_THREAD = 0xFF80
"""A worker thread was at work for it, from start to end."""
CODE_QUEUED = 0xFFA0
"""A thread that was at work for it waited for a core, for end less start in all: within the entry
of CODE_RAN or CODE_THREAD with the same start; where none has it, from start to end."""
CODE_OFF = 0xFFC0
"""As CODE_QUEUED: the thread was off the core for another cause: a lock, a call that blocks. Added
is how often it slept meanwhile, as a place in TIMES_ON_CORE."""
TIMES_ON_CORE = (*range(13), *(round(12 * 1.2**step) for step in range(1, 20)))
assert len(TIMES_ON_CORE) == LOOPS
CODE_BUSY = 0xFFE0
"""The event loop ran from start to end, and what ran was no step of a request: the server's own
code, a task of the app."""
MOST_LOOPS = CODE_MEMBER_TRACE - CODE_BUSY
"""Loops are numbered from 0 to one less than this."""

assert HEADER_CRC_AT + 4 <= LIVE_WORD * 8
assert COUNTER_WORDS + len(COUNTERS) <= WAIT_WORDS
assert (WAIT_WORDS + len(WAITS)) * 8 <= NAMES_AT
assert GAPS_AT + GAPS.size == ENTRIES_AT, GAPS_AT + GAPS.size
assert ENDS_AT + 8 * ENTRIES_PER_SLOT == SLOT_BYTES
assert NAMES_AT + NAME_CAPACITY * NAME_BYTES <= DATA_AT


def file_bytes(in_flight_slots: int, ring_slots: int) -> int:
    """Return the size of a recorder file with that many slots."""
    return DATA_AT + (in_flight_slots + ring_slots) * SLOT_BYTES
