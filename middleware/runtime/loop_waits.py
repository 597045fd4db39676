"""Who ran on the event loop, and who could have gone on but had to wait for it.

Only requests of a load run that is open here are watched. Each step of such a request, from where
the loop resumes it until it awaits again, is timed; what it awaits is stamped with when it was
ready. Both are entries of the request's record (`CODE_RAN` and its neighbours; docs/waits.md). The
stamps need four functions of the loop, replaced on the loop itself while a load run lasts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from itertools import count
from threading import get_ident
from typing import Any

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.runtime import stops, workers
from stagescope.middleware.runtime.stamped_future import (
    StampedFuture,
    answer,
    answers_of,
    made_ready_by,
)
from stagescope.middleware.runtime.thread_clock import FLOOR_NS, Reading, ThreadClock, record
from stagescope.middleware.runtime.workers import Round
from stagescope.recorder import format as fmt

_now = time.monotonic_ns

FACTS_A_FLOOR = 128
"""After so many facts of one request its floor doubles: a stream of tokens has thousands."""
QUIET_S = 5.0
"""The loop gets its own functions back when no request of a load run came for so long, and none is
in flight."""
LONGEST_S = 600.0
"""A request that takes longer is not waited for."""
BREAK_NS = 300_000
"""Between two steps the loop's own code runs; only longer breaks are recorded."""
BUSY_SHARE = 0.9
"""The loop slept in a break in which its thread slept, and had or awaited a core for less than this."""
LONG_NS = 300_000
"""So much work in a break in which it slept too is recorded as its end."""
_MOST_EDGES = 4096

_ATTRIBUTE = "_stagescope_waits"
"""Of the loop: its watch goes when the loop goes."""
_numbers = count()


def stepped(work: Any, timeline: Timeline) -> Any:
    """Return what to await instead of *work*, a coroutine that serves the request of *timeline*.

    *work* itself where there is no asyncio loop, or where it is no coroutine.
    """
    with guarded(timeline.recorder):
        watch = running_watch()
        if watch is not None and asyncio.iscoroutine(work):
            watch.keep_on()
            stops.keep_watching(timeline.recorder, watch.clock)
            watch.in_flight += 1
            return Steps(work, timeline, watch, root=True)
    return work


def running_watch() -> LoopWatch | None:
    """Return the watch of the running loop, made where there is none.

    None where no asyncio loop runs, or one that takes no attributes.
    """
    loop: Any = asyncio._get_running_loop()
    watch: LoopWatch | None = getattr(loop, _ATTRIBUTE, None)
    if watch is None and loop is not None:
        with suppress(AttributeError):
            watch = LoopWatch(loop, next(_numbers) % fmt.MOST_LOOPS)
            setattr(loop, _ATTRIBUTE, watch)
    return watch


def end_step(timeline: Timeline, at_ns: int) -> None:
    """Record that *timeline*'s step ran until *at_ns*, before its record is finished."""
    with guarded(timeline.recorder):
        watch = running_watch()
        if watch is not None and watch.running is not None:
            watch.running.ran_until(timeline, at_ns)


class LoopWatch:
    """What is known of one event loop while a load run lasts."""

    def __init__(self, loop: asyncio.AbstractEventLoop, number: int) -> None:
        self.number = number
        self.running: Steps | None = None
        """The step that runs now."""
        self.in_flight = 0
        """Requests of a load run that have begun and not ended."""
        self.tasks: dict[int, list[Steps]] = {}
        """What a request started beside itself, by the id of its timeline."""
        self.edges: dict[int, int] = {}
        """When another thread made a future ready, by its id; for futures that have no stamp."""
        self._begin_anew()
        self._on = False
        self._used_s = 0.0
        self._set_timer = loop.call_later
        self._loop_time = loop.time
        self._replacements = _replacements(loop, self)
        self._own_functions = vars(loop)

    def keep_on(self) -> None:
        """Let the loop stamp, from now until no request of a load run has come for a while."""
        self._used_s = self._loop_time()
        if not self._on or self.clock.ident != get_ident():  # It runs in another thread now.
            self._begin_anew()
        if not self._on:
            self._on = True
            workers.switch_on(self)
            self._own_functions.update(self._replacements)
            self._set_timer(QUIET_S, self._check)

    def _begin_anew(self) -> None:
        """Know nothing of what ran before now."""
        self.clock = ThreadClock()
        self.known_ns, self.known = _now(), self.clock.reading
        """Until when what ran on the loop is recorded, and the thread's clock then."""

    def _check(self) -> None:
        with guarded():
            self._check_use()

    def _check_use(self) -> None:
        quiet_s = self._loop_time() - self._used_s
        if quiet_s < QUIET_S or (self.in_flight and quiet_s < LONGEST_S):
            self._set_timer(QUIET_S, self._check)
            return
        self._on = False
        workers.switch_off(self)
        for name, function in self._replacements.items():
            # What somebody else put over ours stays, with ours below it, which go on to work.
            if self._own_functions.get(name) is function:
                del self._own_functions[name]
        self.edges.clear()

    def edge(self, callback: Any, args: tuple[Any, ...]) -> None:
        """Note that another thread asks the loop to call *callback*, which may set a future."""
        target = made_ready_by(callback, args)
        if isinstance(target, StampedFuture):
            target.stamp(exact=True)
        elif asyncio.isfuture(target):
            if len(self.edges) >= _MOST_EDGES:
                self.edges.clear()
            self.edges[id(target)] = _now()


def _replacements(
    loop: asyncio.AbstractEventLoop, watch: LoopWatch
) -> dict[str, Callable[..., Any]]:
    """Return what stands in the place of four of the loop's functions while it is watched."""
    later, soon, task = loop.call_later, loop.call_soon_threadsafe, loop.create_task

    def create_future() -> StampedFuture:
        return StampedFuture(loop=loop)

    def call_later(delay: float, callback: Any, *args: Any, **options: Any) -> Any:
        if args and isinstance(args[0], StampedFuture):
            args[0].due_ns = _now() + int(delay * 1e9)
        return later(delay, callback, *args, **options)

    def call_soon_threadsafe(callback: Any, *args: Any, **options: Any) -> Any:
        with guarded():
            watch.edge(callback, args)
            at_ns = _now()
            done = workers.waking(at_ns)
            if done is not None:
                callback, args = answer, ((done, at_ns), callback, *args)
        return soon(callback, *args, **options)

    def create_task(work: Any, **options: Any) -> Any:
        timeline = current.get()
        if timeline is not None and timeline.watched and not timeline.done:
            with guarded():
                if asyncio.iscoroutine(work) and not isinstance(work, Steps):
                    work = Steps(work, timeline, watch, created_ns=_now())
        return task(work, **options)

    return {
        function.__name__: function
        for function in (create_future, call_later, call_soon_threadsafe, create_task)
    }


class Steps(Coroutine[Any, Any, Any]):
    """A coroutine of a request, whose steps are timed; in all else it is the coroutine inside."""

    def __init__(
        self,
        inner: Coroutine[Any, Any, Any],
        timeline: Timeline,
        watch: LoopWatch,
        *,
        created_ns: int = 0,
        root: bool = False,
    ) -> None:
        self._inner = inner
        self._timeline = timeline
        self._watch = watch
        self._begun_ns = 0
        self._used: Reading = (0, 0, 0)
        self._unread_ns = 0
        """Of the thread's clock when the step began."""
        self._awaited: Any = None
        self._since_ns = created_ns
        """When it gave the loop back, or was made; 0: it did not wait for the loop yet."""
        self._siblings = watch.tasks.setdefault(id(timeline), []) if created_ns else []
        """Tasks that the request started and that have not ended, this one among them."""
        if created_ns:
            self._siblings.append(self)
        self._root = root
        self._facts = 0
        self._floor_ns = FLOOR_NS
        self.ended_ns = 0
        """When it returned or raised; 0 until then."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)  # `cr_frame` and its like: anyio asks for the state.

    def __await__(self) -> Generator[Any, Any, Any]:
        return self

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        return self._step(self._inner.send, None)

    def send(self, value: Any) -> Any:
        return self._step(self._inner.send, value)

    def throw(self, *error: Any) -> Any:
        return self._step(self._inner.throw, *error)

    def close(self) -> None:
        with guarded():
            self._leave()
        self._inner.close()

    def _leave(self) -> None:
        """Be no task of the request any more, nor a request in flight."""
        self._watch.in_flight -= self._root
        self._root = False
        if self in self._siblings:
            self._siblings.remove(self)
            if not self._siblings:
                self._watch.tasks.pop(id(self._timeline), None)

    def _step(self, run: Callable[..., Any], *args: Any) -> Any:
        watch = self._watch
        before, watch.running = watch.running, self
        with guarded(self._timeline.recorder):
            self._begin(alone=before is None)
        try:
            awaited = self._awaited = run(*args)
        except BaseException:
            self.ended_ns = _now()
            watch.running = before
            with guarded(self._timeline.recorder):
                self.ran_until(self._timeline, self.ended_ns)
                self._leave()
            raise
        self._since_ns = _now()
        watch.running = before
        with guarded(self._timeline.recorder):
            self.ran_until(self._timeline, self._since_ns)
        return awaited

    def _begin(self, *, alone: bool) -> None:
        """Note that a step begins; not *alone* where it is within another one."""
        watch = self._watch
        clock, begun_ns = watch.clock, _now()
        before = clock.reading
        used = self._used = clock.look(begun_ns)
        self._unread_ns = clock.unread_ns
        worked = self._since_ns and self._resumed(begun_ns)
        self._begun_ns = begun_ns
        if alone and begun_ns - watch.known_ns > BREAK_NS:
            self._break(begun_ns, used)
        if not worked and (queued_ns := used[1] - before[1]) >= self._floor_ns:
            # The kernel woke the loop's thread, and no core was free: for a request's first step
            # before its timeline begins.
            self._fact(fmt.CODE_QUEUED, max(self._since_ns, begun_ns - queued_ns), begun_ns)

    def ran_until(self, timeline: Timeline, at_ns: int) -> None:
        """Record the step that is under way, where it is *timeline*'s."""
        if timeline is not self._timeline or timeline.done:
            return
        if at_ns - self._begun_ns >= self._floor_ns:
            watch = self._watch
            used = watch.clock.look(at_ns, self._unread_ns + FLOOR_NS)
            record(timeline, fmt.CODE_RAN + watch.number, self._begun_ns, at_ns, self._used, used)
            watch.known_ns, watch.known = at_ns, used
            self._count()

    def _break(self, at_ns: int, used: Reading) -> None:
        """Record what ran on the loop since the last recorded step, where it was no such step."""
        watch = self._watch
        since_ns, before = watch.known_ns, watch.known
        watch.known_ns, watch.known = at_ns, used
        busy_ns = used[0] + used[1] - before[0] - before[1]
        if used[2] > before[2] and busy_ns < BUSY_SHARE * (at_ns - since_ns):
            if busy_ns < LONG_NS:
                return
            since_ns = at_ns - busy_ns
        self._fact(fmt.CODE_BUSY, since_ns, at_ns)

    def _resumed(self, at_ns: int) -> bool:
        """Record what it waited for since it gave the loop back, and that it goes on at *at_ns*.

        Return whether a worker was at work for it all the time.
        """
        since_ns, awaited = self._since_ns, self._awaited
        self._awaited = None
        if at_ns - since_ns < self._floor_ns or self._timeline.done:
            return False
        with guarded(self._timeline.recorder):
            answers = answers_of(awaited)
            if working := workers.at_work(self._timeline, answers):
                # A model that streams: whatever the request itself waits for, that goes on.
                workers.claim(self._timeline, working, since_ns, at_ns)
                return True
            self._waited(awaited, answers, since_ns, at_ns)
        return False

    def _waited(self, awaited: Any, answers: list[Round], since_ns: int, at_ns: int) -> None:
        """Record what it waited for, the loop among it, where no worker goes on for it."""
        if awaited is None:  # `sleep(0)`, or a task that was just made: ready from the first.
            if self._others_due(at_ns) <= since_ns:  # Else it would have waited for that task.
                self._fact(fmt.CODE_READY, since_ns, at_ns)
            return
        ready_ns, due_ns, exact = self._ready(awaited)
        if ready_ns < since_ns:
            # It was made ready while the step that awaits it still ran, or its thread had no core
            # on the way back to the loop; what is older is of another future with the same id.
            ready_ns = since_ns if ready_ns >= self._begun_ns > 0 else 0
        for done in answers:
            workers.claim(self._timeline, done, since_ns, min(ready_ns or at_ns, at_ns))
        if self._others_due(at_ns) > max(ready_ns, due_ns):
            return  # Without the loop's wait the request would have waited for that task.
        if due_ns and due_ns <= ready_ns:
            self._fact(fmt.CODE_DUE, max(due_ns, since_ns), at_ns)
        elif not ready_ns or ready_ns > at_ns:
            self._fact(fmt.CODE_AWAITED, since_ns, at_ns)
        else:
            if not exact:
                self._fact(fmt.CODE_AWAITED, since_ns, ready_ns)
            self._fact(fmt.CODE_READY, ready_ns, at_ns)

    def _others_due(self, at_ns: int) -> int:
        """Return until when another task of the request sleeps or slept, at most *at_ns*."""
        times = [
            other._awaited.due_ns
            for other in self._siblings
            if other is not self and isinstance(other._awaited, StampedFuture)
        ]
        return min(max(times, default=0), at_ns)

    def _ready(self, awaited: Any) -> tuple[int, int, bool]:
        """Return when *awaited* was ready (0: not known), due by a timer (0: none), and if exact."""
        if isinstance(awaited, StampedFuture):
            return awaited.ready_ns, awaited.due_ns, awaited.exact
        if edge_ns := self._watch.edges.pop(id(awaited), 0):
            return edge_ns, 0, True
        if isinstance(awaited, asyncio.Task):
            made = awaited.get_coro()
            return (made.ended_ns, 0, True) if isinstance(made, Steps) else (0, 0, False)
        if children := getattr(awaited, "_children", None):  # `asyncio.gather`
            found = [self._ready(child) for child in children]
            if all(ready_ns and exact for ready_ns, _, exact in found):
                return max(ready_ns for ready_ns, _, _ in found), 0, True
        return 0, 0, False

    def _fact(self, code: int, start_ns: int, end_ns: int) -> None:
        if end_ns - start_ns < self._floor_ns:
            return
        number = 0 if code == fmt.CODE_QUEUED else self._watch.number
        self._timeline.mark(code + number, start_ns, end_ns)
        self._count()

    def _count(self) -> None:
        self._facts += 1
        if not self._facts % FACTS_A_FLOOR:
            self._floor_ns *= 2
