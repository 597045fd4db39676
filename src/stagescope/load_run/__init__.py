"""A load run: drive the server, collect its side of the story, write the run folder.

`run_load(plan, url)` is all of it, for programs and notebooks; `stagescope load` parses its
arguments, calls it and prints. Importing this package needs the standard library alone, so that
a missing extra is one sentence when a run is asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from stagescope.errors import needs
from stagescope.load_run.plan import LoadPlan, RunFolder

if TYPE_CHECKING:
    from stagescope.loadgen.progress import Watch

__all__ = ["LoadPlan", "RunFolder", "load_run", "run_load"]


def run_load(plan: LoadPlan, url: str, watch: Watch | None = None) -> RunFolder:
    """Load *url* as *plan* says, and return the run folder; *watch* sees the run's progress.

    Raises UsageError for what cannot be run as given or where the extra `load` is missing, and
    StagescopeError where nothing answers.
    """
    with needs("load"):
        from stagescope.load_run.run import execute

        return execute(plan, url, watch)


def load_run(url: str, **options: Any) -> Path:
    """Load *url* and return the path of the run folder; *options* are the fields of `LoadPlan`."""
    return run_load(LoadPlan(**options), url).path


class _Package(ModuleType):
    """`stagescope.load_run` is the function for users, and this package to the import system.

    Whichever of the two was named first, calling it loads the server.
    """

    def __call__(self, url: str, **options: Any) -> Path:
        """Load *url*: see `load_run`."""
        return load_run(url, **options)


sys.modules[__name__].__class__ = _Package
