"""A call of a model, charged to `inference` once, however many hooked libraries it goes through.

A pipeline calls a module, which may call another runtime: the outermost of them is the call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar, Token
from threading import local
from types import FunctionType, TracebackType
from typing import Any

from stagescope.middleware.hooks import LOADS
from stagescope.middleware.patching import PATCHED, wrap
from stagescope.middleware.recording.guard import fault, guarded
from stagescope.middleware.recording.names import CODES, intern
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.runtime.cold_start import is_cold
from stagescope.middleware.runtime.workers import UNMARKED, present
from stagescope.middleware.stage import marked, marked_call, stage
from stagescope.stages import LOAD, stage_of

_INFERENCE = CODES["inference"]
_STRUCTURE = UNMARKED | {
    intern("endpoint"),
    *(code for name, code in CODES.items() if stage_of(name) == "queue"),
    *(CODES[name] for name in ("preprocess.read", "preprocess.parse", "postprocess.serialize")),
}
"""Stages that hooks of web frameworks open around the app's code: a call within is recognised.

Any other that is open is a mark of the app's or of a server's, and wins.
"""

_inside: ContextVar[Timeline | None] = ContextVar("stagescope_model_call", default=None)
"""The timeline whose model call this code is part of."""


def _to_charge() -> Timeline | None:
    """Return whom a recognised call is to be charged to; None inside another, and under a mark."""
    timeline = present()
    if timeline is None or timeline is _inside.get():
        return None
    return timeline if timeline.innermost(0) in _STRUCTURE else None


class model_call:
    """Charge what is inside to `inference`; inside another one, and outside a request, nothing.

    Nothing is charged either where the app has marked what goes on, unless this *is* its mark.
    """

    __slots__ = ("_is_mark", "_stage", "_token")

    _stage: stage

    def __init__(self, *, is_mark: bool = False) -> None:
        self._is_mark = is_mark
        self._token: Token[Timeline | None] | None = None

    def __enter__(self) -> None:
        with guarded():
            timeline = present() if self._is_mark else _to_charge()
            if timeline is not None and timeline is not _inside.get():
                self._begin(timeline, _INFERENCE)

    def _begin(self, timeline: Timeline, code: int) -> None:
        self._stage = stage.of_code(code)
        self._token = _inside.set(timeline)
        self._stage.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is not None:
            self._stage.__exit__(kind, error, traceback)
            _inside.reset(self._token)


def timed_call(function: Callable[..., Any], code: int = _INFERENCE) -> Callable[..., Any]:
    """Make each call of *function* a recognised call, charged to the stage *code*; for `wrap`.

    Only the outermost of nested calls counts, and none under a mark: that one costs a look.
    """
    in_stage = marked_call(code)

    def timed(*args: Any, **kwargs: Any) -> Any:
        timeline = None
        try:
            timeline = _to_charge()
        except Exception as problem:
            if fault(problem, None):
                raise
        if timeline is None:
            return function(*args, **kwargs)
        token = _inside.set(timeline)
        try:
            with stage.of_code(code):
                return in_stage(function, *args, **kwargs)
        finally:
            _inside.reset(token)

    return timed


def timed_part(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Charge *function* to the sub-stage *name* where it runs within a recognised call."""
    code = intern(name)
    in_stage = marked_call(code)

    def timed(*args: Any, **kwargs: Any) -> Any:
        if _inside.get() is None:
            return function(*args, **kwargs)
        with stage.of_code(code):
            return in_stage(function, *args, **kwargs)

    return timed


def wrap_methods(owner: type, methods: Mapping[str, int]) -> None:
    """Make recognised calls of those *methods* (name to code) that *owner* and its bases define."""
    for base in owner.__mro__:
        for name in methods.keys() & vars(base).keys():
            timed = functools.partial(timed_call, code=methods[name])
            found = vars(base)[name]
            if isinstance(found, FunctionType):
                wrap(base, name, timed)
            elif isinstance(getattr(found, "fn", None), FunctionType):
                # scikit-learn's `available_if`: a descriptor that gives a method, or none.
                wrap(found, "fn", timed)


# Times the load calls of frameworks as `load.FRAMEWORK` while the process is cold.
#
# Each framework is found in `sys.modules`, never imported. A load inside another (a checkpoint read
# by `from_pretrained`) is part of it.


_loading_now = local()


def wrap_loads(module: str) -> None:
    """Time the load calls of *module*, which is loaded; what it does not have is passed over."""
    code = intern(f"{LOAD}.{module.partition('.')[0]}")
    for path in LOADS[module]:
        *owners, name = path.split(".")
        owner: Any = functools.reduce(getattr, owners, sys.modules[module])
        _wrap(owner, name, code)


def wrap_loaded(modules: Iterable[str] = tuple(LOADS)) -> None:
    """Time the load calls of those *modules* that this process has loaded."""
    for module in modules:
        if module in sys.modules:
            with guarded():
                wrap_loads(module)


def _wrap(owner: Any, name: str, code: int) -> None:
    found = vars(owner).get(name)  # Not getattr: that would bind a class method to this class.
    inner = found.__func__ if isinstance(found, classmethod) else found
    if not callable(inner) or hasattr(inner, PATCHED):
        return
    timed = functools.wraps(inner)(_timed(inner, code))
    setattr(timed, PATCHED, inner)
    setattr(owner, name, classmethod(timed) if isinstance(found, classmethod) else timed)


def _timed(inner: Callable[..., Any], code: int) -> Callable[..., Any]:
    def load(*args: Any, **kwargs: Any) -> Any:
        opened: stage | None = None
        with guarded():
            if is_cold() and not getattr(_loading_now, "load", False):
                opened = stage.of_code(code)
        if opened is None:
            return inner(*args, **kwargs)
        _loading_now.load = True
        try:
            with opened:
                return inner(*args, **kwargs)
        finally:
            _loading_now.load = False

    return marked(load, code)
