"""Work that threads and tasks of the app's own do for requests that wait for it: whose it was.

Many servers hand a request to a model thread through a queue, and wait for its answer. By its
context that thread works for nobody. But whoever wakes a request after a model call, or out of
one, made that call for it. So, while a load run lasts:

- a stage or model call outside requests is a *block* of its worker, a thread or a task;
- the blocks between two answers of a worker are a *round*;
- whom a worker wakes after or within a round charges its blocks to the stages of their names, and
  the time until they began to `queue.worker`, as far as the worker was busy with other rounds, and
  to `batch.wait`, as far as it then waited for others.

A stage that is marked around the waiting wins: then nothing is charged. docs/waits.md has the
rules and what they cannot see.
"""

from __future__ import annotations

import queue
import sys
import threading
import time
from typing import TYPE_CHECKING, Any, cast
from weakref import WeakKeyDictionary, finalize

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.runtime import cold_start
from stagescope.middleware.runtime.shared_rounds import Members, write_all
from stagescope.middleware.runtime.thread_clock import FLOOR_NS, Stretch
from stagescope.recorder import format as fmt
from stagescope.stages import stage_of

if TYPE_CHECKING:
    import asyncio

_now = time.monotonic_ns

MOST_BLOCKS = 256
"""Blocks of one round that are remembered, the newest."""
CLAIMS_APART = 16
"""Answers to one request whose blocks get an entry each; of later ones, as of the tokens of a
stream, those of one name share an entry, and the time between them is in it."""

_QUEUE = CODES["queue.worker"]
_WAIT = CODES["batch.wait"]
UNMARKED = frozenset(
    {0, fmt.CODE_OTHER, *(CODES[name] for name in CODES if stage_of(name) == "respond")}
)
"""Stages that nobody marked; so is `endpoint`, where a hook has brought that name."""


class Block:
    """A stage that a worker opened outside requests; an end of 0: it is open."""

    __slots__ = ("code", "end_ns", "start_ns", "stretch")

    def __init__(self, code: int, start_ns: int, end_ns: int = 0) -> None:
        self.code = code
        self.start_ns = start_ns
        self.end_ns = end_ns
        self.stretch: Stretch | None = None
        """What its thread did meanwhile; None where another block is around it, and of a task."""


class Round:
    """What a worker did between two answers: for one request, or for one batch of them."""

    __slots__ = ("blocks", "free_ns", "gathered_ns", "members", "woke_ns")

    def __init__(self, free_ns: int, gathered_ns: int) -> None:
        self.blocks: list[Block] = []
        self.members: Members | None = None
        """The requests that it was for, as far as they are known."""
        self.free_ns = free_ns
        """When the worker had answered all that came before; 0: not known."""
        self.gathered_ns = gathered_ns
        """When it last came back from waiting, before its first block; 0: not known."""
        self.woke_ns = 0
        """When it last woke somebody; 0: not yet."""

    def share(self, request: Timeline, since_ns: int = 0) -> None:
        """Note that it was for *request*, which waited from *since_ns* on (0: not known)."""
        if self.members is None:
            self.members = Members(self.blocks, self.free_ns)
        self.members.add(request, since_ns)


class Worker(Timeline):
    """Where the stages go that a thread or a task opens outside requests."""

    __slots__ = ("__weakref__", "_open", "gathered_ns", "is_task", "round")

    def __init__(self, *, is_task: bool) -> None:
        self._begin_without_slot(cast(Any, _Nowhere), _now)
        self.is_task = is_task
        self.round: Round | None = None
        self.gathered_ns = 0
        self._open: dict[int, Block] = {}

    def spill(self, index: int, code: int, start: int) -> None:
        """Begin the block *index*."""
        block = self._open[index] = Block(code, start)
        self._present_round().blocks.append(block)
        if not self.is_task and len(self._open) == 1:
            block.stretch = Stretch(start)

    def close_at(self, index: int, at_ns: int, failed: bool = False) -> None:
        """End the block *index*."""
        if block := self._open.pop(index, None):
            block.end_ns = at_ns
            if block.stretch is not None:
                block.stretch.end(at_ns)

    def recode(self, index: int, code: int, *, add: bool = False) -> None:
        """Say that the open block *index* is of another stage."""
        if not add and (block := self._open.get(index)):
            block.code = code

    def innermost(self, waiting: int) -> int:
        """Return the code of the block that began last and is open."""
        return next((block.code for block in reversed(self._open.values())), 0)

    def inject(self) -> int | None:
        """Lend nothing: there is no slot."""
        return None

    def _present_round(self) -> Round:
        found = self.round
        if found is None or (found.woke_ns and not self._open_beside_newest()):
            if found is not None and found.members is not None:
                found.members.write()
            found = self.round = Round(found.woke_ns if found else 0, self.gathered_ns)
        if len(found.blocks) >= MOST_BLOCKS:
            del found.blocks[0]
        return found

    def _open_beside_newest(self) -> bool:
        """Return whether the block that just began lies in another one."""
        return len(self._open) > 1

    def adopt(self, done: Round) -> None:
        """Take what another worker did for this one, which waited for it, as its own."""
        if self.round is None or self.round.woke_ns:
            self.round = Round(self.round.woke_ns if self.round else 0, 0)
        self.round.free_ns = max(self.round.free_ns, done.free_ns)
        self.round.blocks = [*self.round.blocks, *done.blocks][-MOST_BLOCKS:]
        self.round.gathered_ns = min((block.start_ns for block in done.blocks), default=0)

    def wake(self, at_ns: int) -> Round | None:
        """Note that it wakes somebody; return what it did for whom it wakes, None for nothing."""
        done = self.round
        if done is None or not done.blocks:
            return None
        done.woke_ns = at_ns
        if self.is_task:
            done.gathered_ns = done.blocks[0].start_ns
        return done


class _Nowhere:
    """Counts nothing: a worker's stages have no recorder."""

    @staticmethod
    def count(counter: str) -> None:
        """Take no notice."""


on = False
"""Whether a load run lasts."""
_users: set[int] = set()
"""The ids of the event loops' watches for which it does."""
_local = threading.local()
_tasks: WeakKeyDictionary[asyncio.Task[Any], Worker] = WeakKeyDictionary()
_lock = threading.RLock()


def present() -> Timeline | None:
    """Return the timeline of the present request; outside one, while a load run lasts, its worker's."""
    timeline = current.get()
    if not on or (timeline is not None and not timeline.done):
        return timeline
    return here(make=True)


def here(*, make: bool = False) -> Worker | None:
    """Return the worker that this code runs in, None where it has done nothing yet."""
    aio = sys.modules.get("asyncio")  # Not loaded where nobody uses it.
    if aio is not None and aio._get_running_loop() is not None:
        task = aio.current_task()
        if task is not None:
            return worker_of(task, make=make)
    worker: Worker | None = getattr(_local, "worker", None)
    if worker is None and make:
        worker = _local.worker = Worker(is_task=False)
    return worker


def begin_anew() -> Worker:
    """Return a new worker that this thread is from now on, with workers switched on for it."""
    worker = _local.worker = Worker(is_task=False)
    switch_on(worker)
    return worker


def did(blocks: list[Block], *, since_ns: int) -> None:
    """Note that another process did *blocks*, beginning at *since_ns*, for whom this thread wakes."""
    worker = here(make=True)
    if worker is not None:
        worker.round = Round(since_ns, since_ns)
        worker.round.blocks = blocks


def worker_of(task: asyncio.Task[Any], *, make: bool = False) -> Worker | None:
    """Return the worker that *task* is."""
    worker = _tasks.get(task)
    if worker is None and make:
        with _lock:
            worker = _tasks.setdefault(task, Worker(is_task=True))
    return worker


def waking(at_ns: int) -> Round | None:
    """Return what the present worker did for the one that it wakes now."""
    worker = here()
    return worker.wake(at_ns) if worker is not None else None


class _Claims:
    """What of a request's record came from workers."""

    __slots__ = ("answers", "last", "newest")

    def __init__(self, newest: Round) -> None:
        self.newest = newest
        self.answers = 0
        self.last: dict[int, int] = {}
        """The newest entry of each code."""


def at_work(timeline: Timeline, answers: list[Round]) -> Round | None:
    """Return the newest round of *answers*, or of those before, if it goes on for *timeline*."""
    claims: _Claims | None = getattr(timeline, "claims", None)
    newest = answers[-1] if answers else claims.newest if claims is not None else None
    if newest is None:
        return None
    start_ns = timeline.start_ns
    goes_on = any(not block.end_ns and block.start_ns >= start_ns for block in newest.blocks)
    return newest if goes_on else None


def woken(timeline: Timeline, done: Round) -> None:
    """Note that *timeline* is woken by a worker after *done*: those woken together shared it."""
    answers = getattr(getattr(timeline, "claims", None), "answers", 0)
    began = any(block.start_ns >= timeline.start_ns for block in done.blocks)
    once = began and answers < CLAIMS_APART
    if once and timeline.watched and not _is_marked(timeline.innermost(0)):
        done.share(timeline)


def claim(timeline: Timeline, done: Round, since_ns: int, ready_ns: int) -> None:
    """Charge to *timeline*, which waited from *since_ns* to *ready_ns*, what was done for it."""
    if ready_ns - since_ns < FLOOR_NS or _is_marked(timeline.innermost(0)):
        return
    blocks = [
        block
        for block in done.blocks
        # A block that began before the request did was made for others.
        if timeline.start_ns <= block.start_ns < ready_ns
        and (not block.end_ns or block.end_ns > since_ns)
    ]
    if not blocks:
        return
    claims: _Claims | None = getattr(timeline, "claims", None)
    first = claims is None or claims.newest is not done
    if claims is None:
        claims = timeline.claims = _Claims(done)
    claims.newest = done
    claims.answers += 1
    if first and claims.answers <= CLAIMS_APART:
        done.share(timeline, since_ns)
    first_ns = min(block.start_ns for block in blocks)
    if first and claims.answers <= CLAIMS_APART and first_ns > since_ns:
        busy_ns = min(max(done.free_ns, since_ns), first_ns)
        waited_ns = min(max(done.gathered_ns, busy_ns), first_ns)
        _enter(timeline, _QUEUE, since_ns, busy_ns)
        _enter(timeline, _WAIT, busy_ns, waited_ns)
    for block in _visible(blocks, since_ns, ready_ns):
        start, end = max(block.start_ns, since_ns), min(block.end_ns or ready_ns, ready_ns)
        if claims.answers > CLAIMS_APART and block.code in claims.last:
            timeline.close_at(claims.last[block.code], end)
        else:
            claims.last[block.code] = _enter(timeline, block.code, start, end)
        whole = (start, end) == (block.start_ns, block.end_ns)
        if block.stretch is not None and whole and claims.answers <= CLAIMS_APART:
            block.stretch.record(timeline)


def _visible(blocks: list[Block], since_ns: int, ready_ns: int) -> list[Block]:
    """Return the blocks, by their start, without those that lie wholly under a later one."""
    seen: list[Block] = []
    for block in sorted(blocks, key=lambda block: block.start_ns, reverse=True):
        start, end = max(block.start_ns, since_ns), min(block.end_ns or ready_ns, ready_ns)
        if not any(
            max(later.start_ns, since_ns) <= start
            and min(later.end_ns or ready_ns, ready_ns) >= end
            for later in seen
        ):
            seen.append(block)
    return seen[::-1]


def _enter(timeline: Timeline, code: int, start_ns: int, end_ns: int) -> int:
    if end_ns - start_ns < FLOOR_NS:
        return -1
    index = timeline.open_at(code, start_ns)
    timeline.close_at(index, end_ns)
    return index


def _is_marked(code: int) -> bool:
    """Return whether somebody says what stage *code* is; the rest of a request may be anything."""
    return code not in UNMARKED and code != CODES.get("endpoint")


# Waking and waiting between threads: `queue.Queue`, `Event`, `Semaphore` and `Future` all come to
# these two functions.

_condition_wait = threading.Condition.wait
_condition_notify = threading.Condition.notify
_QUEUE_GET = queue.Queue.get.__code__
_ANSWER = "_stagescope_answer"
"""Of a condition: the round of whoever notified it last, and when."""
_WAITING = "_stagescope_waiting"
"""Of a condition: how many requests of a load run wait for it."""


def _wait(self: threading.Condition, timeout: float | None = None) -> bool:
    timeline = current.get()
    if timeline is None or timeline.done or not timeline.watched:
        got = _condition_wait(self, timeout)
        with guarded():
            worker = here()
            if worker is not None:
                worker.gathered_ns = _now()
        return got
    since_ns = _now()
    setattr(self, _WAITING, getattr(self, _WAITING, 0) + 1)  # The caller holds its lock.
    try:
        return _condition_wait(self, timeout)
    finally:
        setattr(self, _WAITING, getattr(self, _WAITING, 1) - 1)
        with guarded(timeline.recorder):
            done, at_ns = getattr(self, _ANSWER, (None, 0))
            if done is not None and at_ns >= since_ns:
                claim(timeline, done, since_ns, at_ns)


def _notify(self: threading.Condition, n: int = 1) -> None:
    with guarded():
        # `Queue.get` notifies those who wait to put: that is no answer.
        if getattr(self, _WAITING, 0) and sys._getframe(1).f_code is not _QUEUE_GET:  # pyright: ignore[reportPrivateUsage]
            at_ns = _now()
            if done := waking(at_ns):
                setattr(self, _ANSWER, (done, at_ns))
    _condition_notify(self, n)


def switch_on(user: object) -> None:
    """Let workers be seen, until *user* and all others have called `switch_off` or are gone."""
    global on
    if id(user) not in _users:
        _users.add(id(user))
        finalize(user, _gone, id(user)).atexit = False
    if not on:
        on = True
        threading.Condition.wait = _wait  # type: ignore[method-assign]
        threading.Condition.notify = _notify  # type: ignore[method-assign]
        cold_start.find_by(present)


def switch_off(user: object) -> None:
    """Let stages outside requests cost nothing again, and forget what was done."""
    _without(id(user))


def _gone(user: int) -> None:
    with guarded():
        _without(user)


def _without(user: int) -> None:
    global on
    _users.discard(user)
    if _users or not on:
        return
    on = False
    write_all()
    cold_start.find_by(cold_start.PLAIN)
    # What somebody else put over ours stays, with ours below it, which go on to work.
    if threading.Condition.wait is _wait:
        threading.Condition.wait = _condition_wait  # type: ignore[method-assign]
    if threading.Condition.notify is _notify:
        threading.Condition.notify = _condition_notify  # type: ignore[method-assign]
    _tasks.clear()
