"""Installing a hook: whole, or not at all."""

from __future__ import annotations

import logging
import sys
import types

import pytest

from stagescope.middleware.hooks import HOOKS
from stagescope.middleware.hooks.hook import Hook, install
from stagescope.middleware.patching import wrap


class Framework:
    """Something to hook."""

    def first(self) -> str:
        """Is there in every version."""
        return "first"


class Derived(Framework):
    """Has `first` from its base."""


def test_a_hook_that_misses_a_name_midway_leaves_nothing_wrapped(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was wrapped before the missing name was found is as it was; it is logged once."""
    plain = Framework.first

    def half() -> None:
        wrap(Framework, "first", lambda inner: lambda self: f"timed {inner(self)}")
        wrap(Derived, "first", lambda inner: lambda self: f"timed {inner(self)}")
        wrap(Framework, "second", lambda inner: inner)

    module = types.ModuleType("planted_hook")
    module.HOOK = Hook("planted", "pytest", ("1", "1000"), half)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "planted_hook", module)
    monkeypatch.setattr(
        "stagescope.middleware.hooks.hook.HOOKS", {**HOOKS, "planted": "planted_hook:HOOK"}
    )
    with caplog.at_level(logging.WARNING):
        assert not install("planted")
    assert "hook planted steps aside" in caplog.text
    assert Framework.first is plain
    assert Derived().first() == "first"
