"""What `stage` as a decorator makes of a function: a wrapper that opens the stage at each call.

A wrapper runs with the globals of the function that it wraps (see `_in_namespace_of`), so what it
uses of this module it has in locals around it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncIterator, Callable, Generator
from sys import modules
from types import FunctionType, TracebackType
from typing import Any, Protocol, cast

from stagescope.middleware.recording.guard import fault, guarded

STEPS_TIMED_APART = 16
"""Steps of a decorated generator that get an opening each; the rest share one (see `stage`)."""


class Opening(Protocol):
    """A `with` block of `stage`, as far as wrappers go."""

    def __enter__(self) -> None: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
        /,
    ) -> None: ...

    def leave_app_spans(self) -> None:
        """Let the app's own spans hang where they did before this stage."""


Opener = Callable[[int], Opening]
"""Makes an opening of a stage by its code: `stage.of_code`."""


def wrapper_of(function: Callable[..., Any], of_code: Opener, code: int) -> Callable[..., Any]:
    """Return what is to be called instead of *function*, so that the stage *code* is timed."""
    if inspect.isasyncgenfunction(function):
        wrapper: Callable[..., Any] = _async_generator(function, of_code, code)
    elif inspect.isgeneratorfunction(function):
        wrapper = _generator(function, of_code, code)
    elif inspect.iscoroutinefunction(function):
        wrapper = _coroutine(function, of_code, code)
    else:
        wrapper = _function(function, of_code, code)
    return _in_namespace_of(function, wrapper)


def _in_namespace_of(
    function: Callable[..., Any], wrapper: Callable[..., Any]
) -> Callable[..., Any]:
    """Return *wrapper* with the globals of *function*, in which its annotations are looked up.

    Some frameworks look for them in the outermost function's module.
    """
    own = cast(FunctionType, wrapper)
    namespace = getattr(function, "__globals__", None)
    if not isinstance(namespace, dict):
        return wrapper
    moved = FunctionType(own.__code__, namespace, own.__name__, own.__defaults__, own.__closure__)
    moved.__kwdefaults__ = own.__kwdefaults__
    return moved


def _function(function: Callable[..., Any], of_code: Opener, code: int) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        with of_code(code):
            return function(*args, **kwargs)

    return timed


def _coroutine(function: Callable[..., Any], of_code: Opener, code: int) -> Callable[..., Any]:
    async def timed(*args: Any, **kwargs: Any) -> Any:
        with of_code(code):
            return await function(*args, **kwargs)

    return timed


def _generator(function: Callable[..., Any], of_code: Opener, code: int) -> Callable[..., Any]:
    begun, partial = Steps, functools.partial

    def timed(*args: Any, **kwargs: Any) -> Generator[Any, Any, Any]:
        inner = function(*args, **kwargs)
        step: Callable[[], Any] = inner.__next__
        steps = begun(of_code, code)
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
                    step = partial(inner.throw, thrown)
                else:
                    step = inner.__next__ if sent is None else partial(inner.send, sent)
        except BaseException as error:
            steps.close(error)
            raise
        finally:
            steps.close()
            inner.close()

    return timed


def _async_generator(
    function: Callable[..., Any], of_code: Opener, code: int
) -> Callable[..., Any]:
    begun, partial, other_closes, shielded = Steps, functools.partial, _is_closed_elsewhere, guarded

    async def timed(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        inner = function(*args, **kwargs)
        step: Callable[[], Any] = inner.__anext__
        steps = begun(of_code, code)
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
                    step = partial(inner.athrow, thrown)
                else:
                    step = inner.__anext__ if sent is None else partial(inner.asend, sent)
        except BaseException as error:
            steps.close(error)
            raise
        finally:
            steps.close()
            closed = False
            with shielded():
                closed = await other_closes(inner)
            if not closed:
                await inner.aclose()

    return timed


async def _is_closed_elsewhere(inner: Any) -> bool:
    """Return whether somebody else closes *inner*, the generator behind a decorated one.

    The event loop closes generators that were left behind in a task each, both of ours where the
    garbage collector found both, or where the loop ends; two at once would be an error.
    """
    asyncio: Any = modules.get("asyncio")
    try:
        task = asyncio.current_task() if asyncio else None
    except RuntimeError:
        return False  # Not asyncio's loop.
    if task is not None and type(task.get_coro()).__name__ == "async_generator_athrow":
        await asyncio.sleep(0)  # The other task, if there is one, begins.
    return bool(getattr(inner, "ag_running", False))


class Steps:
    """Openings of one running generator: the first ones apart, the rest as one."""

    __slots__ = ("_code", "_left", "_of_code", "_open")

    def __init__(self, of_code: Opener, code: int) -> None:
        self._of_code = of_code
        self._code = code
        self._left = STEPS_TIMED_APART
        self._open: Opening | None = None

    def begin(self) -> None:
        """Say that a step begins."""
        try:
            if self._open is None:
                self._open = self._of_code(self._code)
                self._open.__enter__()
                if not self._left:
                    self._open.leave_app_spans()
        except Exception as problem:
            if fault(problem, None):
                raise

    def end(self) -> None:
        """Say that it has ended."""
        try:
            if self._left:
                self._left -= 1
                self.close()
        except Exception as problem:
            if fault(problem, None):
                raise

    def close(self, failed: BaseException | None = None) -> None:
        """Say that there is no further step."""
        try:
            if self._open is not None:
                opened, self._open = self._open, None
                opened.__exit__(type(failed) if failed else None, failed, None)
        except Exception as problem:
            if fault(problem, None):
                raise
