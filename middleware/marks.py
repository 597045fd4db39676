"""Marks: frames of ours whose name tells a stack sampler which stage the code above them is in.

A wrapper's code object is copied once under the name `__stage_<full name>__`. Whoever reads
stacks, ours or another profiler, then sees the stage between the frames, without joining clocks;
calling the wrapper costs what it did before. The agent reads them in `agent/stage_labels.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType
from typing import Any, TypeVar, cast

from stagescope.middleware.names import CODES

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
