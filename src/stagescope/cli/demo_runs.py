"""What the demo asks of the load driver and of the analysis, in one place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

WARMUP_S = 1.0
TIMEOUT_S = 60.0
"""Longer than the top rate's queue gets in a run of the default length."""


class Interrupted(Exception):
    """A run was ended by Ctrl-C; what it has is in its folder."""


def drive(url: str, image: bytes, rate: float, seconds: float, *, spool: Path, out: Path) -> None:
    """Drive one rate and leave the run folder *out*, joined with the server's side from *spool*.

    Raises Interrupted where Ctrl-C ended it early.
    """
    from stagescope.cli.load_progress import progress
    from stagescope.cli.load_run import Settings, execute
    from stagescope.cli.server_side import Place
    from stagescope.loadgen.target import Target

    settings = Settings(
        target=Target(url, "POST", (("Content-Type", "image/jpeg"),), image),
        rate_per_s=rate,
        duration_s=seconds,
        warmup_s=WARMUP_S,
        timeout_s=max(TIMEOUT_S, seconds),
        out=out,
        place=Place(spool=spool),
    )
    with progress(quiet=False) as watch:
        _, run, collected = execute(settings, watch)
    for problem in collected.problems:
        print(f"demo: {problem}", file=sys.stderr)
    if run.interrupted:
        raise Interrupted(out)


def print_comparison(folders: Sequence[Path]) -> None:
    """Print the runs' tables side by side, and below them what grew from each to the next."""
    from rich.console import Console

    from stagescope.analysis.build import build_report
    from stagescope.analysis.side_by_side import side_by_side

    Console().print(side_by_side([build_report(folder) for folder in folders]))
