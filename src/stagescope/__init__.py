"""stagescope: where did this request's time go, stage by stage, and what holds the server back?

The public names are loaded lazily: naming `StageMiddleware`, `stage`, `carry`, `batch` or `install` loads the
standard library alone; `load_run` loads the load driver and what it needs.
"""

from __future__ import annotations

from importlib import import_module

TYPE_CHECKING = False  # type checkers know it; `typing` itself would be most of what this costs

if TYPE_CHECKING:
    from stagescope.face import StageMiddleware, install
    from stagescope.load_run import load_run
    from stagescope.middleware.batch import batch
    from stagescope.middleware.stage import carry, stage

__all__ = ["StageMiddleware", "batch", "carry", "install", "load_run", "stage"]

_HOMES = {
    "StageMiddleware": "stagescope.face",
    "batch": "stagescope.middleware.batch",
    "carry": "stagescope.middleware.stage",
    "install": "stagescope.face",
    "load_run": "stagescope.load_run",
    "stage": "stagescope.middleware.stage",
}


def __getattr__(name: str) -> object:
    """Load a public name from the room that it lives in."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(home)
    # The package of that name can be called: one object, whichever of the two was imported first.
    value = module if name == "load_run" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
