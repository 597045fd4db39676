"""The timeline in another process of the same host: lent as text, written to in place.

A request that crosses processes (API server, worker) keeps one record: the process that owns it
reserves one more slot for it and passes the slot's place along with the payload. The worker maps
the owner's recorder file and writes its stages there, on the same monotonic clock. No way back
is needed, and a killed worker leaves the stage that it died in.

    payload["stagescope"] = inject()                # in the request
    with attached(payload["stagescope"]): ...     # in the worker: `stage` and `batch` just work
"""

from __future__ import annotations

import mmap
import os
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import count
from pathlib import Path

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES, BorrowedCodes, BorrowedNames
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.slots import Slot
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.runtime import cold_start
from stagescope.recorder import format as fmt


def inject() -> str | None:
    """Lend the present request's timeline to another process; None where there is none.

    The text holds ids, a slot's place and the time of lending; it is good for one attachment.
    """
    timeline = current.get()
    if timeline is None or timeline.done:
        return None
    at = timeline.inject()
    path = timeline.recorder.path
    if at is None or path is None:
        return None
    return ";".join(
        (
            timeline.trace_id.hex(),
            timeline.span_id.hex(),
            str(timeline.start_ns),
            str(timeline.clock()),
            str(at),
            timeline.run.decode(),
            str(path),
        )
    )


class AttachedTimeline(Timeline):
    """A timeline that another process of this host owns; ended by its owner alone."""

    __slots__ = ("lent_ns", "names")

    def __init__(self, carrier: str, recorder: Recorder, clock: Callable[[], int]) -> None:
        trace, span, start, lent, at, run, path = carrier.split(";", 6)
        self._begin_without_slot(
            recorder, clock, int(start), bytes.fromhex(trace), bytes.fromhex(span), run.encode()
        )
        self.lent_ns = int(lent)
        """When it was lent: the begin of the wait between the two processes."""
        self.watched = recorder.runs.has(self.run, self.lent_ns) if run else False
        self.indices = count()
        memory = _memory_of(path)
        slot = self.slot = Slot(memory, int(at))
        self.names = _names_of(path)
        self.codes = BorrowedCodes(slot.codes, self.names)  # type: ignore[assignment]
        self.times = slot.times
        if bytes(slot.raw[fmt.OPENED_AT + 32 : fmt.OPENED_AT + 40]) != self.span_id:
            raise ValueError("the slot belongs to another request by now")

    def place(self, index: int) -> tuple[Slot, int] | None:
        """Find the place of an entry; None beyond the lent slot."""
        if self.done or index >= fmt.ENTRIES_PER_SLOT:
            return None
        return self.slot, index

    def recode(self, index: int, code: int, *, add: bool = False) -> None:
        """Say that the stage of entry *index* is another one, from its start on."""
        super().recode(index, code if add else self.names.code(code), add=add)

    def inject(self) -> int | None:
        """Lend nothing on: a lent slot has one writer."""
        return None

    def finish(self, *_: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write no more here; the owner ends the timeline."""
        self.done = True


def extract(
    carrier: str | None, recorder: Recorder, clock: Callable[[], int] = time.monotonic_ns
) -> AttachedTimeline | None:
    """Take up a lent timeline; None where it is gone, malformed, or on another host.

    *recorder* is this process's own: batches that the timeline joins here are written to it.
    """
    if not carrier:
        return None
    if cold_start.is_cold():
        cold_start.end()  # A worker's first request has come.
    try:
        return AttachedTimeline(carrier, recorder, clock)
    except (OSError, ValueError):
        return None


@contextmanager
def attached(
    carrier: str | None, recorder: Recorder, clock: Callable[[], int] = time.monotonic_ns
) -> Iterator[AttachedTimeline | None]:
    """Work for the lent timeline inside the block."""
    timeline = None
    with guarded(recorder):
        timeline = extract(carrier, recorder, clock)
    if timeline is None:
        yield None
        return
    token = current.set(timeline)
    try:
        yield timeline
    finally:
        current.reset(token)
        timeline.done = True


@lru_cache(maxsize=64)
def _memory_of(path: str) -> memoryview:
    """Map another process's recorder file for writing; a spool's own files only.

    Raises OSError where it cannot be opened, ValueError where it is none.
    """
    if Path(path).suffix != fmt.SUFFIX:
        raise ValueError(f"{path} is no recorder file")
    fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"{path} is no recorder file")
        memory = memoryview(mmap.mmap(fd, 0))
    finally:
        os.close(fd)
    if bytes(memory[:8]) != fmt.MAGIC:
        raise ValueError(f"{path} is no recorder file")
    return memory


@lru_cache(maxsize=64)
def _names_of(path: str) -> BorrowedNames:
    return BorrowedNames(path, _memory_of(path))


class CarriedId(str):
    """The id itself, to everyone who does not ask for its *carrier*."""

    carrier: str | None = None


def carried(request_id: str) -> str:
    """Return *request_id* with the present request's timeline, which from now on waits in a queue.

    Outside a request it is given back as it is.
    """
    identity: str | None = None
    with guarded():
        identity = _with_carrier(request_id)
    return identity or request_id


def _with_carrier(request_id: str) -> str | None:
    carrier = inject()
    timeline = current.get()
    if carrier is None or timeline is None or not timeline.lent:
        return None
    # The worker's first entry takes this one's place; until then, also if the worker never
    # comes, the request is seen to wait.
    slot = timeline.lent[-1]
    slot.codes[0] = CODES["queue.batch"]
    slot.times[0] = timeline.clock()
    identity = CarriedId(request_id)
    identity.carrier = carrier
    return identity
