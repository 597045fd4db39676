"""Times the load calls of frameworks as `load.FRAMEWORK` while the process is cold.

Each framework is found in `sys.modules`, never imported. A load inside another (a checkpoint read
by `from_pretrained`) is part of it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from threading import local
from typing import Any

from stagescope.middleware.cold_start import is_cold
from stagescope.middleware.guard import guarded
from stagescope.middleware.hooks import LOADS
from stagescope.middleware.hooks.hook import PATCHED
from stagescope.middleware.marks import marked
from stagescope.middleware.names import intern
from stagescope.middleware.stage import stage
from stagescope.stages import LOAD

_inside = local()


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
        if not is_cold() or getattr(_inside, "load", False):
            return inner(*args, **kwargs)
        _inside.load = True
        try:
            with stage.of_code(code):
                return inner(*args, **kwargs)
        finally:
            _inside.load = False

    return marked(load, code)
