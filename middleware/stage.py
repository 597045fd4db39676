"""`stage(...)`, which users write around their code, and `carry(...)`, which takes it along."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from threading import RLock
from types import CodeType, FunctionType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from stagescope.middleware.decorators import wrapper_of
from stagescope.middleware.otel_context import Attached
from stagescope.middleware.recording.guard import fault, guarded
from stagescope.middleware.recording.names import CODES, intern
from stagescope.middleware.recording.slots import ENDS
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.runtime import cold_start
from stagescope.middleware.runtime.thread_clock import timed
from stagescope.recorder import format as fmt

# Marks: frames of ours whose name tells a stack sampler which stage the code above them is in.
#
# A wrapper's code object is copied once under the name `__stage_<full name>__`. Whoever reads
# stacks, ours or another profiler, then sees the stage between the frames, without joining clocks;
# calling the wrapper costs what it did before. The agent reads them in `agent/stacks/labels.py`.


F = TypeVar("F", bound=Callable[..., Any])

_copies: dict[tuple[CodeType, str], CodeType] = {}
"""A copy serves all wrappers made from one `def` for one stage, so that it warms up once."""


def marked(function: F, stage: str | int) -> F:
    """Let *function* appear in stacks as the mark of *stage*, a full name or its code."""
    name = stage if isinstance(stage, str) else _name_of(stage)
    plain = cast(FunctionType, function)
    key = (plain.__code__, name)
    if key not in _copies:
        mark = f"__stage_{name}__"
        _copies[key] = plain.__code__.replace(co_name=mark, co_qualname=mark)
    plain.__code__ = _copies[key]
    return function


def mark(stage: str) -> Callable[[F], F]:
    """Make a decorator of `marked`."""
    return lambda function: marked(function, stage)


def _name_of(code: int) -> str:
    return next((name for name, known in CODES.items() if known == code), "other")


P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def marked_call(code: int) -> Callable[..., Any]:
    """Return what calls a function, under the mark of the stage *code*: `(function, *args, **kwargs)`."""

    def call(function: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return marked(call, code)


def in_other_thread(function: Callable[..., R], submitted_ns: int = 0) -> Callable[..., R]:
    """Return *function* as a worker thread is to call it: its stack names the stage of its caller.

    The same where the caller is in no stage. Nothing is charged: the caller's stage goes on. While
    a load run lasts the wait for a thread since *submitted_ns*, unless 0, is recorded.
    """
    timeline = current.get()
    if timeline is None or timeline.done:
        return function
    if timeline.watched:
        function = functools.partial(timed, timeline, submitted_ns, time.monotonic_ns(), function)
    code = timeline.innermost(_THREADPOOL)
    return functools.partial(marked_call(code), function) if code else function


class _Openings:
    """Stands where the timeline of a `stage` object does that is open more than once, or nowhere.

    It is told from a timeline by its `nesting`, which `__exit__` asks for anyway.
    """

    __slots__ = ("first", "further")

    nesting = True

    def __init__(self, first: Timeline | None = None) -> None:
        self.first = first
        """What the object itself is open in; None once it has left that."""
        self.further: list[stage] = []
        """Its openings beside that, each by an object of its own."""


_NOBODY = cast(Timeline, _Openings())
"""Stands for the timeline of an opening outside of requests."""

_openings_lock = RLock()
"""Reentrant: a signal handler may open stages too."""


def _code_of(name: object) -> int:
    with guarded():
        return intern(name)
    return fmt.CODE_OTHER


def is_failure(kind: type[BaseException] | None, error: BaseException | None = None) -> bool:
    """Return whether an exception that leaves a stage is a failure of that stage.

    A cancelled or closed stage did not fail: that is no Exception. Nor did one that answers the
    client with a 4xx, by an exception that carries its status as those of Starlette do.
    """
    if kind is None or not issubclass(kind, Exception):
        return False
    status = getattr(error, "status_code", 500)
    return not (isinstance(status, int) and status < 500)


_THREADPOOL = CODES["queue.threadpool"]
_now: cold_start.Getter = current.get
"""The present timeline; a bound method in a global is found without looking it up."""


def _ask(getter: cold_start.Getter) -> None:
    """Find the timeline by *getter*; while the process is cold that is not `current.get`."""
    global _now
    _now = getter


cold_start.follow(_ask)

assert ENDS == 32  # a literal in `__exit__`


class stage:
    """Charge the time inside to the stage *name*, in the request that this code works for.

    As a `with` block in sync or async code, or as the decorator of a function, an async
    function, a generator or an async generator. A generator is charged while it runs, not
    while it waits to be resumed; after its first 16 steps the rest counts as one opening, so
    a stream of ten thousand tokens needs no ten thousand entries.

    Names are free (`preprocess`, `inference.decode`, `rerank`); the six of
    `stagescope.stages.STAGES` have columns of their own. Outside a request it does nothing, but
    for the time until the first one is answered: then it is part of the cold start.
    One object may be entered again while it is open, by any request, task or thread.
    Nothing that can go wrong with it reaches the caller.
    """

    __slots__ = ("_attached", "_code", "_index", "_timeline")

    _attached: Attached | None
    _index: int

    def __init__(self, name: str) -> None:
        self._timeline: Timeline | None = None
        """What it is open in (see `_Openings`); None where it is not open."""
        try:
            self._code = CODES[name]
        except (KeyError, TypeError):
            self._code = _code_of(name)

    @classmethod
    def of_code(cls, code: int) -> stage:
        """Make a stage of a code that `intern` gave."""
        opened = cls.__new__(cls)
        opened._code = code
        opened._timeline = None
        return opened

    def __enter__(self) -> None:
        try:
            timeline = _now()
            # No call stands between the question and the answer, so no other thread comes between.
            if self._timeline is not None:
                self._enter_another()
                return
            if timeline is None:
                self._timeline = _NOBODY
                return
            self._timeline = timeline
            # Timeline.open, written out: this runs for each stage of each request. What is
            # called stands in a local first: `timeline.clock()` would look for a method.
            clock = timeline.clock
            index = self._index = next(timeline.indices)
            try:
                timeline.codes[index] = self._code
                timeline.times[index] = now = clock()
            except (IndexError, ValueError):
                now = clock()
                timeline.spill(index, self._code, now)
            if timeline.nesting is not None:
                self._nest(timeline, now)
        except Exception as problem:
            if fault(problem, None):
                raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            timeline = self._timeline
            if timeline is None:
                return
            if timeline.nesting is None:
                self._timeline = None  # As above: nothing comes between.
            elif (timeline := self._exit_nested(kind, error, traceback)) is None:
                return
            index = self._index
            clock = timeline.clock
            if kind is None:
                try:
                    timeline.times[index + 32] = clock()
                except (IndexError, ValueError):
                    timeline.close_at(index, clock())  # Beyond the first slot, or nowhere.
            else:
                timeline.close_at(index, clock(), failed=is_failure(kind, error))
        except Exception as problem:
            if fault(problem, None):
                raise

    def _enter_another(self) -> None:
        another = stage.of_code(self._code)
        another.__enter__()
        with _openings_lock:
            held: Any = self._timeline
            if held is _NOBODY or not isinstance(held, _Openings):
                held = _Openings(self._timeline)
                self._timeline = cast(Timeline, held)
            held.further.append(another)

    def _exit_nested(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> Timeline | None:
        """Leave what is not the usual case; return the timeline where its entry is yet to close."""
        with _openings_lock:
            timeline = self._timeline
            held: Any = timeline
            if held is not _NOBODY and isinstance(held, _Openings):
                own = self._leave_one(held)
            else:
                self._timeline, own = None, None
        if own is not None:
            own.__exit__(kind, error, traceback)
        elif timeline is not None and timeline is not _NOBODY:
            self._leave_app_spans(timeline)
            return timeline
        return None

    def _leave_one(self, openings: _Openings) -> stage:
        """Take out the opening of the present request: of several, that which opened last."""
        present = _now() or _NOBODY
        own = next((one for one in reversed(openings.further) if one._timeline is present), None)
        if own is not None:
            openings.further.remove(own)
        elif openings.first is present or not openings.further:
            own = stage.of_code(self._code)
            own._timeline, openings.first = openings.first, None
            if own._timeline is not None and own._timeline is not _NOBODY:
                own._index = self._index
                if own._timeline.nesting is not None:
                    own._attached = self._attached
        else:
            own = openings.further.pop()
        if not openings.further:
            self._timeline = openings.first
        return own

    def _nest(self, timeline: Timeline, at_ns: int) -> None:
        """Let the app's own spans hang under this stage's; not once the request has ended."""
        self._attached = None
        if timeline.nesting is not None and not timeline.done:
            with guarded(timeline.recorder):
                self._attached = timeline.nesting.enter_stage(at_ns)

    def leave_app_spans(self) -> None:
        """Let the app's own spans hang where they did before this stage."""
        timeline: object = self._timeline
        if isinstance(timeline, Timeline):
            self._leave_app_spans(timeline)

    def _leave_app_spans(self, timeline: Timeline) -> None:
        if timeline.nesting is None or self._attached is None:
            return
        attached, self._attached = self._attached, None
        with guarded(timeline.recorder):
            timeline.nesting.leave(attached)

    def __call__(self, function: F) -> F:
        """Decorate *function*; each call is an opening of its own."""
        with guarded():
            return self._decorated(function)
        return function

    def _decorated(self, function: F) -> F:
        wrapper = wrapper_of(function, stage.of_code, self._code)
        return cast(F, functools.wraps(function)(marked(wrapper, self._code)))


def carry(function: Callable[P, R]) -> Callable[P, R]:
    """Take the timeline of the present request along to wherever *function* is called.

    For bare executors and threads: `executor.submit(carry(work), item)`. The time from here to
    the start of *function* is charged to `queue.threadpool`. Outside a request, or for what
    asyncio.to_thread and anyio start (they take the context along), it is not needed.
    """
    timeline = current.get()
    if timeline is None:
        return function
    waiting: list[int] = []
    with guarded(timeline.recorder):
        waiting.append(timeline.open(_THREADPOOL))

    @functools.wraps(function)
    def carried(*args: P.args, **kwargs: P.kwargs) -> R:
        token = current.set(timeline)
        if waiting:
            with guarded(timeline.recorder):
                timeline.close(waiting.pop())
        try:
            return function(*args, **kwargs)
        finally:
            current.reset(token)

    return carried
