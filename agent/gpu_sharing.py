"""Whether hardware counters (GPM) may be read: DCGM reads the same ones, and was here first."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from stagescope.errors import UsageError

COUNTERS_VARIABLE: Final = "STAGESCOPE_GPM"
"""`on`: read them beside DCGM too; `off`: never; unset: unless DCGM runs here."""
DCGM: Final = frozenset({"dcgm-exporter", "nv-hostengine"})
LOOK_S: Final = 60.0

_log = logging.getLogger("stagescope")


def counters_allowed(
    environment: Mapping[str, str] = os.environ,
    governor: Callable[[], bool] = lambda: True,
    *,
    proc: Path = Path("/proc"),
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], bool]:
    """Make what tells whether the counters may be read now; *governor* may forbid it as well.

    Raises UsageError for a setting that is none.
    """
    asked = environment.get(COUNTERS_VARIABLE, "")
    if asked not in {"", "on", "off"}:
        raise UsageError(f"{COUNTERS_VARIABLE}={asked}: give on or off")
    if asked:
        return lambda: asked == "on" and governor()
    look_s, found = 0.0, ""

    def allowed() -> bool:
        nonlocal look_s, found
        if clock() >= look_s:
            look_s, before, found = clock() + LOOK_S, found, _running(proc)
            if found and not before:
                _log.info("gpu: %s reads the hardware counters here, so they are left to it; "
                          "%s=on reads them too", found, COUNTERS_VARIABLE)  # fmt: skip
        return not found and governor()

    return allowed


def _running(proc: Path) -> str:
    """Give the name of a DCGM process of this host, if there is one that we can see."""
    for comm in proc.glob("[0-9]*/comm"):
        try:
            name = comm.read_text("utf-8", "replace").strip()
        except OSError:  # it ended
            continue
        if name in DCGM:
            return name
    return ""
