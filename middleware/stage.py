"""`stage(...)`, which users write around their code, and `carry(...)`, which takes it along."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Generator
from types import CodeType, FunctionType, TracebackType
from typing import Any, ParamSpec, TypeVar, cast

from stagescope.middleware.otel_context import Attached
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES, intern
from stagescope.middleware.recording.slots import ENDS
from stagescope.middleware.recording.timeline import Timeline, current
from stagescope.middleware.runtime import cold_start
from stagescope.middleware.runtime.thread_clock import timed

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


def in_other_thread(function: Callable[..., R]) -> Callable[..., R]:
    """Return *function* as a worker thread is to call it: its stack names the stage of its caller.

    The same where the caller is in no stage. Nothing is charged: the caller's stage goes on.
    """
    timeline = current.get()
    if timeline is None or timeline.done:
        return function
    if timeline.run:
        function = functools.partial(timed, timeline, function)
    code = timeline.innermost(_THREADPOOL)
    return functools.partial(marked_call(code), function) if code else function


_THREADPOOL = CODES["queue.threadpool"]
_now: cold_start.Getter = current.get
"""The present timeline; a bound method in a global is found without looking it up."""


def _ask(getter: cold_start.Getter) -> None:
    """Find the timeline by *getter*; while the process is cold that is not `current.get`."""
    global _now
    _now = getter


cold_start.follow(_ask)

assert ENDS == 32  # a literal in `__exit__`

STEPS_TIMED_APART = 16
"""Steps of a decorated generator that get an opening each; the rest share one (see `stage`)."""


class stage:
    """Charge the time inside to the stage *name*, in the request that this code works for.

    As a `with` block in sync or async code, or as the decorator of a function, an async
    function, a generator or an async generator. A generator is charged while it runs, not
    while it waits to be resumed; after its first 16 steps the rest counts as one opening, so
    a stream of ten thousand tokens needs no ten thousand entries.

    Names are free (`preprocess`, `inference.decode`, `rerank`); the six of
    `stagescope.stages.STAGES` have columns of their own. Outside a request it does nothing, but
    for the time until the first one is answered: then it is part of the cold start.
    Nothing that can go wrong with it reaches the caller.
    """

    __slots__ = ("_attached", "_code", "_index", "_timeline")

    _attached: Attached | None
    _timeline: Timeline | None
    _index: int

    def __init__(self, name: str) -> None:
        try:
            self._code = CODES[name]
        except (KeyError, TypeError):
            self._code = intern(name)

    @classmethod
    def of_code(cls, code: int) -> stage:
        """Make a stage of a code that `intern` gave."""
        opened = cls.__new__(cls)
        opened._code = code
        return opened

    def __enter__(self) -> None:
        timeline = self._timeline = _now()
        if timeline is not None:
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        timeline = self._timeline
        if timeline is not None:
            if timeline.nesting is not None:
                self.leave_app_spans()
            index = self._index
            clock = timeline.clock
            if kind is None:
                try:
                    timeline.times[index + 32] = clock()
                except (IndexError, ValueError):
                    timeline.close_at(index, clock())  # Beyond the first slot, or nowhere.
            else:
                # A cancelled or closed stage is not a failed one: that is no Exception.
                timeline.close_at(index, clock(), failed=issubclass(kind, Exception))

    def _nest(self, timeline: Timeline, at_ns: int) -> None:
        """Let the app's own spans hang under this stage's; not once the request has ended."""
        self._attached = None
        if timeline.nesting is not None and not timeline.done:
            with guarded(timeline.recorder):
                self._attached = timeline.nesting.enter_stage(at_ns)

    def leave_app_spans(self) -> None:
        """Let the app's own spans hang where they did before this stage."""
        timeline = self._timeline
        if timeline is None or timeline.nesting is None or self._attached is None:
            return
        attached, self._attached = self._attached, None
        with guarded(timeline.recorder):
            timeline.nesting.leave(attached)

    def __call__(self, function: F) -> F:
        """Decorate *function*; each call is an opening of its own."""
        code = self._code
        if inspect.isasyncgenfunction(function):
            wrapper: Callable[..., Any] = _async_generator(function, code)
        elif inspect.isgeneratorfunction(function):
            wrapper = _generator(function, code)
        elif inspect.iscoroutinefunction(function):
            wrapper = _coroutine(function, code)
        else:
            wrapper = _function(function, code)
        return cast(F, functools.wraps(function)(marked(wrapper, code)))


def _function(function: Callable[..., Any], code: int) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with stage.of_code(code):
            return function(*args, **kwargs)

    return timed


def _coroutine(function: Callable[..., Any], code: int) -> Callable[..., Any]:
    async def timed(*args: Any, **kwargs: Any) -> Any:
        with stage.of_code(code):
            return await function(*args, **kwargs)

    return timed


def _generator(function: Callable[..., Any], code: int) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner = function(*args, **kwargs)
        step: Callable[[], Any] = inner.__next__
        steps = Steps(code)
        try:
            while True:
                steps.begin()
                try:
                    value = step()
                except StopIteration as end:
                    return end.value
                steps.end()
                try:
                    sent = yield value
                except GeneratorExit:
                    raise
                except BaseException as thrown:  # noqa: BLE001 - handed on to the generator
                    step = functools.partial(inner.throw, thrown)
                else:
                    step = inner.__next__ if sent is None else functools.partial(inner.send, sent)
        except BaseException as error:
            steps.close(type(error))
            raise
        finally:
            steps.close()
            inner.close()

    return timed


def _async_generator(function: Callable[..., Any], code: int) -> Callable[..., Any]:
    async def timed(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        inner = function(*args, **kwargs)
        step: Callable[[], Any] = inner.__anext__
        steps = Steps(code)
        try:
            while True:
                steps.begin()
                try:
                    value = await step()
                except StopAsyncIteration:
                    return
                steps.end()
                try:
                    sent = yield value
                except GeneratorExit:
                    raise
                except BaseException as thrown:  # noqa: BLE001 - handed on to the generator
                    step = functools.partial(inner.athrow, thrown)
                else:
                    step = inner.__anext__ if sent is None else functools.partial(inner.asend, sent)
        except BaseException as error:
            steps.close(type(error))
            raise
        finally:
            steps.close()
            await inner.aclose()

    return timed


class Steps:
    """Openings of one running generator: the first ones apart, the rest as one."""

    __slots__ = ("_code", "_left", "_open")

    def __init__(self, code: int) -> None:
        self._code = code
        self._left = STEPS_TIMED_APART
        self._open: stage | None = None

    def begin(self) -> None:
        """Say that a step begins."""
        if self._open is None:
            self._open = stage.of_code(self._code)
            self._open.__enter__()
            if not self._left:
                self._open.leave_app_spans()

    def end(self) -> None:
        """Say that it has ended."""
        if self._left:
            self._left -= 1
            self.close()

    def close(self, failed: type[BaseException] | None = None) -> None:
        """Say that there is no further step."""
        if self._open is not None:
            self._open.__exit__(failed, None, None)
            self._open = None


def carry(function: Callable[P, R]) -> Callable[P, R]:
    """Take the timeline of the present request along to wherever *function* is called.

    For bare executors and threads: `executor.submit(carry(work), item)`. The time from here to
    the start of *function* is charged to `queue.threadpool`. Outside a request, or for what
    asyncio.to_thread and anyio start (they take the context along), it is not needed.
    """
    timeline = current.get()
    if timeline is None:
        return function
    waiting = [timeline.open(_THREADPOOL)]

    @functools.wraps(function)
    def carried(*args: P.args, **kwargs: P.kwargs) -> R:
        token = current.set(timeline)
        if waiting:
            timeline.close(waiting.pop())
        try:
            return function(*args, **kwargs)
        finally:
            current.reset(token)

    return carried
