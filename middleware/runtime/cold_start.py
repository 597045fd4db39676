"""The cold start: from the start of the process until its first request is answered.

While the process is cold, `stage` outside a request writes into the cold start's timeline. How it
finds it is what `follow` is told of: once the process is warm that is `current.get` again, so a
warm process pays nothing for having been cold.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import RLock

from stagescope import settings
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import intern
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.recording.slots import Slot
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.types import Message, Send
from stagescope.recorder import format as fmt
from stagescope.stages import FIRST_REQUEST, IDLE, IMPORTS, STARTUP

MOST_CHAINED = 4
"""Slots beyond the first that stages of a cold start may fill: 160 openings in all."""


class ColdTimeline(Timeline):
    """In plain memory until `move` finds it a place in a recorder file."""

    __slots__ = ("in_file",)

    def __init__(self, start_ns: int, clock: Callable[[], int]) -> None:
        scratch = Recorder(
            memoryview(bytearray(fmt.file_bytes(1, 1))),
            in_flight_slots=1,
            ring_slots=1,
            clock=clock,
        )
        scratch.close()
        ids = os.urandom(24)
        super().__init__(scratch, fmt.KIND_COLD_START, start_ns, ids[:16], ids[16:])
        self.in_file = False

    def full(self) -> bool:
        """Return whether it takes no further stages of the user's."""
        return self.chain is not None and len(self.chain) >= MOST_CHAINED

    def move(self, recorder: Recorder) -> None:
        """Go on in *recorder*'s file; a stage that is open stays open, at its place there."""
        self.in_file = True
        old, chain = self.slot, self.chain
        copied: list[Slot] = []
        try:
            copied.extend(_copied(slot, recorder) for slot in (old, *(chain or ())))
        except BaseException:
            for slot in copied:
                recorder.discard(slot)
            raise
        self.recorder = recorder
        if chain is not None:
            chain[:] = copied[1:]
        new = self.slot = copied[0]
        self.codes = new.codes
        self.times = new.times
        # What another thread wrote to the old place while we copied.
        new.raw[fmt.ENTRIES_AT :] = old.raw[fmt.ENTRIES_AT :]


def _copied(slot: Slot, recorder: Recorder) -> Slot:
    """Copy *slot* into the file; its state last, as for a timeline that begins."""
    copied = recorder.acquire()
    content = bytearray(slot.raw)
    content[fmt.STATE_AT] = fmt.STATE_FREE
    copied.raw[:] = content
    copied.raw[fmt.STATE_AT] = fmt.STATE_OPEN
    return copied


STARTTIME_FIELD = 22
"""Of `/proc/PID/stat`, counted from 1 (proc(5)); in clock ticks since boot."""


def process_start_ns(stat: Path = Path("/proc/self/stat")) -> int:
    """Return when this process was forked, monotonic ns; now where the system does not tell.

    The kernel counts in clock ticks, so it is early by up to one (10 ms on Linux), never late.
    """
    now_ns = time.monotonic_ns()
    try:
        # The name, field 2, stands in brackets and may hold anything, brackets too.
        fields = stat.read_bytes().rpartition(b")")[2].split()
        ticks = int(fields[STARTTIME_FIELD - 3])
        since_boot_ns = ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        asleep_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - now_ns
    except (OSError, ValueError, IndexError, AttributeError):
        return now_ns
    start_ns = since_boot_ns - asleep_ns
    return start_ns if 0 < start_ns <= now_ns else now_ns


ASGI_SERVERS = {"uvicorn", "hypercorn", "granian", "gunicorn"}

Getter = Callable[[], Timeline | None]
"""How `stage` finds the timeline that it writes to."""

PLAIN: Getter = current.get
"""How it finds that in a warm process, but while a load run lasts: see workers.py."""

_warm = PLAIN

_followers: list[Callable[[Getter], None]] = []
_lock = RLock()
"""Reentrant, as a signal handler may open a stage while this thread holds it."""
_cold = not settings.DISABLE.on()
_timeline: ColdTimeline | None = None
_part = -1
"""The entry of the part of the cold start that is open: imports, startup, idle, first request."""


def follow(tell: Callable[[Getter], None]) -> None:
    """Be told, now and at each change, how a stage finds its timeline."""
    _followers.append(tell)
    tell(present if _cold else current.get)


def find_by(getter: Getter) -> None:
    """Let stages find their timeline by *getter*, from now on; by PLAIN: as if it had not been."""
    global _warm
    _warm = getter
    _tell(present if _cold and getter is PLAIN else getter)


def is_cold() -> bool:
    """Return whether the process has still to answer its first request."""
    return _cold


def present() -> Timeline | None:
    """Return the present request's timeline; outside one that of the cold start."""
    return current.get() or _timeline_for_stages()


def _timeline_for_stages() -> Timeline | None:
    timeline = begin()
    if timeline is None:
        return None
    if not timeline.in_file and settings.RUN.on() and ASGI_SERVERS & sys.modules.keys():
        _open_early(timeline)
    if timeline.full():
        _tell(_warm)  # A loop of stages without requests: let it cost nothing.
        return None
    return timeline


def begin() -> ColdTimeline | None:
    """Return the timeline of this process's cold start, begun where it is not; None when warm."""
    global _timeline, _part
    if not _cold or _timeline is not None:
        return _timeline if _cold else None
    with _lock:
        if _timeline is None:
            timeline = ColdTimeline(process_start_ns(), time.monotonic_ns)
            part = timeline.open_at(intern(IMPORTS), timeline.start_ns)
            if _timeline is None:  # A signal handler of this thread may have been faster.
                _timeline, _part = timeline, part
    return _timeline


def _open_early(timeline: ColdTimeline) -> None:
    """Open the recorder before the server asks for it, so that death in a load leaves a record.

    Only under `stagescope run`, and where one of ASGI_SERVERS is loaded: such a process will be
    recorded in any case, and its first request will end the cold start.
    """
    from stagescope.middleware.process import default_service, process_recorder

    timeline.in_file = True  # Whatever becomes of it: it is tried once.
    with guarded():
        recorder = process_recorder(None, default_service())
        if recorder is not None:
            _move(timeline, recorder)


def _move(timeline: ColdTimeline, recorder: Recorder) -> None:
    timeline.move(recorder)
    atexit.register(end)


def keep(recorder: Recorder) -> None:
    """Put the cold start into the file of *recorder*, the first that this process opens."""
    timeline = begin()
    if timeline is not None and not timeline.in_file:
        with guarded(recorder):
            _move(timeline, recorder)


def next_part(name: str, *, failed: bool = False) -> None:
    """End the part that is open, and begin the next one at the same instant."""
    global _part
    timeline = begin()
    if timeline is not None:
        with guarded():
            now = timeline.clock()
            timeline.close_at(_part, now, failed)
            _part = timeline.open_at(intern(name), now)


def end(error: str = "", *, at_ns: int = 0, failed: bool = False) -> None:
    """End the cold start, with its record where there is a file; the process is warm from now on."""
    global _cold, _timeline
    with _lock:
        timeline, _timeline = _timeline, None
        _cold = False
    with guarded():
        _tell(_warm)
    if timeline is None:
        return
    with guarded(), suppress(ValueError):  # The file is a forked parent's.
        end_ns = at_ns or timeline.clock()
        with guarded(timeline.recorder):
            timeline.close_at(_part, end_ns, failed)
        try:
            timeline.finish(end_ns, 0, 0, 0, 0, 0, 0, error.encode(), b"")
        finally:
            if not timeline.done:
                timeline.discard()


def _tell(getter: Getter) -> None:
    for tell in _followers:
        tell(getter)


@contextmanager
def aside() -> Iterator[None]:
    """Let stages cost inside what they cost in a warm process: for measuring them."""
    _tell(PLAIN)
    try:
        yield
    finally:
        find_by(_warm)


class Startup:
    """Stands between an app and its server while the app's lifespan starts."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._over = False
        next_part(STARTUP)

    async def send(self, message: Message) -> None:
        """Pass a message of the lifespan on, and note that the startup is over."""
        await self._send(message)
        with guarded():
            if message["type"] == "lifespan.startup.complete":
                self._ready(failed=False)
            elif message["type"] == "lifespan.startup.failed":
                self._over = True
                end("startup failed", failed=True)

    def left(self) -> None:
        """Note that the app's lifespan is over: with the server's, or because it has none."""
        if not self._over:
            self._ready(failed=False)
        else:
            end()

    def _ready(self, *, failed: bool) -> None:
        self._over = True
        next_part(IDLE, failed=failed)


class FirstRequest:
    """Stands between the server and the first request; its end is the end of the cold start."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.ended_ns = 0
        next_part(FIRST_REQUEST)

    async def send(self, message: Message) -> None:
        """Pass a message on; note which request this is, and when its last byte went."""
        if message["type"] == "http.response.start":
            with guarded():
                self._link()
        await self._send(message)
        if message["type"] == "http.response.body" and not message.get("more_body"):
            self.ended_ns = time.monotonic_ns()

    def _link(self) -> None:
        timeline, request = begin(), current.get()
        if timeline is not None and request is not None:
            trace, span = request.trace_id, request.span_id
            low, high = int.from_bytes(trace[8:], "big"), int.from_bytes(trace[:8], "big")
            timeline.mark(fmt.CODE_MEMBER, int.from_bytes(span, "big"), low)
            timeline.mark(fmt.CODE_MEMBER_TRACE, high, 0)


_awaited = True


def first_request() -> bool:
    """Return whether this is the first request of the process; true once."""
    global _awaited
    with _lock:
        first, _awaited = _cold and _awaited, False
    return first


def _begin_anew_in_child() -> None:
    """A forked child starts cold: its start is the fork."""
    global _lock, _cold, _timeline, _awaited
    _lock = RLock()
    _timeline = None
    _awaited = True
    _cold = not settings.DISABLE.on()
    _tell(present if _cold else current.get)


os.register_at_fork(after_in_child=_begin_anew_in_child)
