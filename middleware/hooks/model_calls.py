"""A call of a model, charged to `inference` once, however many hooked libraries it goes through.

A pipeline calls a module, which may call another runtime: the outermost of them is the call.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from contextvars import ContextVar, Token
from threading import local
from types import TracebackType
from typing import Any

from stagescope.middleware.hooks import LOADS
from stagescope.middleware.patching import PATCHED
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES, intern
from stagescope.middleware.recording.timeline import Timeline
from stagescope.middleware.runtime.cold_start import is_cold
from stagescope.middleware.runtime.workers import present
from stagescope.middleware.stage import marked, stage
from stagescope.stages import LOAD

_INFERENCE = CODES["inference"]

_inside: ContextVar[Timeline | None] = ContextVar("stagescope_model_call", default=None)
"""The timeline whose model call this code is part of."""


class model_call:
    """Charge what is inside to `inference`; inside another one, and outside a request, nothing."""

    __slots__ = ("_stage", "_token")

    _token: Token[Timeline | None] | None

    def __enter__(self) -> None:
        timeline = present()
        if timeline is None or timeline is _inside.get():
            self._token = None
            return
        self._token = _inside.set(timeline)
        self._stage = stage.of_code(_INFERENCE)
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


def timed_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make each call of *function* a model call; for `hook.wrap`."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        with model_call():
            return function(*args, **kwargs)

    return marked(timed, _INFERENCE)


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
        if not is_cold() or getattr(_loading_now, "load", False):
            return inner(*args, **kwargs)
        _loading_now.load = True
        try:
            with stage.of_code(code):
                return inner(*args, **kwargs)
        finally:
            _loading_now.load = False

    return marked(load, code)
