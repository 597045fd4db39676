"""What the demo asks of the load driver and of the analysis, in one place."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stagescope.cli.demo_server import ExampleServer

WARMUP_S = 1.0


class Interrupted(Exception):
    """A run was ended by Ctrl-C; what it has is in its folder."""


def drive(server: ExampleServer, image: bytes, rate: float, seconds: float, folder: Path) -> Path:
    """Drive one rate, join it with the server's side, and give the run folder.

    Raises Interrupted where Ctrl-C ended it early.
    """
    raise NotImplementedError


def print_comparison(folders: Sequence[Path]) -> None:
    """Print the tables side by side, what grew from each to the next, and what to try next."""
    raise NotImplementedError
