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

__all__ = ["LoadPlan", "RunFolder", "join_client_file", "load_run", "run_load"]


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


def join_client_file(
    file: Path,
    run_id: str,
    *,
    url: str = "",
    out: Path | None = None,
    spool: Path | None = None,
    agent_url: str = "",
    token: str = "",
) -> RunFolder:
    """Join the requests in *file*, which a client of one's own sent as run *run_id*.

    docs/own-client.md is the file's format. The agent is found as by `LoadPlan`; *url* is what
    was loaded. Raises UsageError for what is not usable as given.
    """
    with needs("load"):
        from stagescope.load_run.locate import AgentLocation
        from stagescope.load_run.own_client import join

        return join(file, run_id, AgentLocation(spool, agent_url, token), url=url, out=out)


class _Package(ModuleType):
    """`stagescope.load_run` is the function for users, and this package to the import system.

    Whichever of the two was named first, calling it loads the server.
    """

    def __call__(self, url: str, **options: Any) -> Path:
        """Load *url*: see `load_run`."""
        return load_run(url, **options)


sys.modules[__name__].__class__ = _Package
