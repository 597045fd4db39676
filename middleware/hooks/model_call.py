"""A call of a model, charged to `inference` once, however many hooked libraries it goes through.

A pipeline calls a module, which may call another runtime: the outermost of them is the call.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar, Token
from types import TracebackType
from typing import Any

from stagescope.middleware.marks import marked
from stagescope.middleware.names import CODES
from stagescope.middleware.stage import stage
from stagescope.middleware.timeline import Timeline, current

_INFERENCE = CODES["inference"]

_inside: ContextVar[Timeline | None] = ContextVar("stagescope_model_call", default=None)
"""The timeline whose model call this code is part of."""


class model_call:
    """Charge what is inside to `inference`; inside another one, and outside a request, nothing."""

    __slots__ = ("_stage", "_token")

    _token: Token[Timeline | None] | None

    def __enter__(self) -> None:
        timeline = current.get()
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
