"""What `wrap` puts in a function's place goes by the name under which it is found there."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from stagescope.middleware.patching import wrap


def inherited(make: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap with a function that refers to what cannot be pickled."""
    return lambda *args: make(*args)


class Base:
    """Has the method."""

    def method(self) -> int:
        """Return a number."""
        return 1


class Derived(Base):
    """Inherits it."""


def test_a_wrapped_method_pickles_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An inherited method, wrapped on the class that inherits it, is found again there."""
    monkeypatch.setattr(Derived, "method", Derived.method)
    wrap(Derived, "method", inherited)

    assert Derived.method.__qualname__ == "Derived.method"
    assert Derived.method is not Base.method
    assert Derived().method() == 1


def test_a_wrapped_name_of_a_module_is_the_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    """A function imported from elsewhere is found under the module that it was wrapped in."""
    import sys

    module = ModuleType("borrowing")
    module.dumps = pickle.dumps  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "borrowing", module)
    wrap(module, "dumps", inherited)

    assert pickle.loads(pickle.dumps(module.dumps)) is module.dumps
