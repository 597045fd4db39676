"""Puts wrappers of ours around functions of others: once each, and off again where one fails."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

PATCHED = "__stagescope__"
"""Set on every wrapper of ours, so that nothing is wrapped twice."""

_wrapped: list[tuple[Any, str, Any]] = []
"""Owner, name and what was there before, in the order of wrapping."""


def wrap(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Replace `owner.name` by *make* of it, once; the wrapper keeps name, doc and signature.

    Raises AttributeError, which `install` takes for "step aside", where there is no such name.
    """
    inner = getattr(owner, name)
    if hasattr(inner, PATCHED):
        return
    wrapper = functools.wraps(inner)(make(inner))
    setattr(wrapper, PATCHED, inner)
    # By the name under which it is found, not the one it was made with: Ray pickles whole apps,
    # and what is not found under its name is pickled by value, our context variables with it.
    if isinstance(owner, ModuleType):
        wrapper.__module__, wrapper.__qualname__ = owner.__name__, name
    elif isinstance(owner, type):
        wrapper.__module__, wrapper.__qualname__ = owner.__module__, f"{owner.__qualname__}.{name}"
    setattr(owner, name, wrapper)
    _wrapped.append((owner, name, inner))


def wrapped_count() -> int:
    """Return how many wrappers are on now, to take off by `unwrap` those that come after."""
    return len(_wrapped)


def unwrap(first: int) -> None:
    """Take off what was wrapped from number *first* on: half a hook would time half a truth."""
    while len(_wrapped) > first:
        owner, name, inner = _wrapped.pop()
        setattr(owner, name, inner)
