"""Installs each hook when its framework is imported: what `stagescope run` sets off in a process.

Loaded at the start of every Python process of a run, so it imports next to nothing; what a hook
needs is loaded with its framework.
"""

from __future__ import annotations

import sys
from functools import cache

from stagescope.middleware.hooks import HOOKS, LOADS
from stagescope.middleware.run_notes import HOOK, PYTHON, note

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType


class ImportWatch:
    """A finder that finds what the others find, and calls *imported* once each *name* is loaded.

    It stands first in `sys.meta_path`. The loader stays the framework's own: only its
    `exec_module` is covered, for the one call.
    """

    def __init__(self, names: Iterable[str], imported: Callable[[str], None]) -> None:
        self.awaited = set(names)
        """May grow."""
        self._imported = imported

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Find *name* by the other finders, if it is awaited; a look alone imports nothing."""
        if name not in self.awaited:
            return None
        spec = self._ask_others(name, path, target)
        # A loader that is a class serves many modules; no framework has such a one.
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, type):
            self._cover(spec.loader, name)
        return spec

    def _ask_others(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            if finder is self or not hasattr(finder, "find_spec"):
                continue
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                return spec
        return None

    def _cover(self, loader: object, name: str) -> None:
        inner = getattr(loader, "exec_module", None)
        if inner is None:
            return

        def exec_module(module: ModuleType) -> None:
            del loader.exec_module  # type: ignore[attr-defined]
            inner(module)
            if name in self.awaited:
                self.awaited.discard(name)
                self._imported(name)

        try:
            loader.exec_module = exec_module  # type: ignore[attr-defined]
        except AttributeError:
            return  # It has slots: the framework is imported, and not timed.


def begin() -> None:
    """Watch for every framework that has a hook; what is imported already gets its hook now."""
    if any(isinstance(finder, ImportWatch) for finder in sys.meta_path):
        return
    note(PYTHON)
    awaited = HOOKS.keys() | set(LOADS)
    early = [name for name in awaited if name in sys.modules]
    sys.meta_path.insert(0, ImportWatch(awaited - set(early), install_hook))
    for name in early:
        install_hook(name)


def install_hook(name: str) -> None:
    """Install a hook, and time the load calls; what goes wrong stays here."""
    from stagescope.middleware.hooks.hook import install
    from stagescope.middleware.recording.guard import guarded

    with guarded():
        _await_third_party()

    if name in LOADS:
        with guarded():
            from stagescope.middleware.hooks.model_calls import wrap_loads

            wrap_loads(name)
    with guarded():
        if (name in HOOKS or name not in LOADS) and install(name):
            note(HOOK + name)


@cache
def _await_third_party() -> None:
    """Watch also for what other packages have hooks for; once, when there is a framework at all."""
    from stagescope.middleware.hooks.hook import third_party

    watch = next((one for one in sys.meta_path if isinstance(one, ImportWatch)), None)
    for name in third_party():
        if name in sys.modules:
            install_hook(name)
        elif watch is not None:
            watch.awaited.add(name)
