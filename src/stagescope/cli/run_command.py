"""The command of `stagescope run`: found before anything is started, and its environment."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from stagescope.errors import StagescopeError, UsageError

BOOTSTRAP = Path(__file__).parent.parent / "middleware" / "bootstrap"
"""Not resolved: in a source tree `middleware` is a link, and the package is on this side of it."""


class NoCommandError(StagescopeError):
    """There is no such command; the exit code is the shell's."""

    exit_code = 127


class CannotRunError(StagescopeError):
    """The command is there and cannot be run; the exit code is the shell's."""

    exit_code = 126


def find_command(words: Sequence[str]) -> str:
    """Give the path of the program that *words* name.

    Raises UsageError where there are none, NoCommandError and CannotRunError as a shell would.
    """
    if not words:
        raise UsageError("which server? for example: stagescope run -- uvicorn app:app")
    name = words[0]
    if found := shutil.which(name):
        return found
    if "/" not in name:
        raise NoCommandError(f"{name}: no such command on PATH")
    if Path(name).exists():
        raise CannotRunError(f"{name} is not a program that may be executed")
    raise NoCommandError(f"{name}: no such file")


def served_environment(
    environment: Mapping[str, str], *, spool: Path, notes: Path, service: str | None
) -> dict[str, str]:
    """Give the environment in which each Python process below installs hooks and records."""
    served = dict(environment)
    served["STAGESCOPE_RUN"] = "1"
    served["STAGESCOPE_RUN_NOTES"] = str(notes)
    served["STAGESCOPE_SPOOL"] = str(spool)
    if service:
        served["OTEL_SERVICE_NAME"] = service
    # An empty entry would mean the current folder.
    behind = served.get("PYTHONPATH")
    served["PYTHONPATH"] = os.pathsep.join([str(BOOTSTRAP), *([behind] if behind else [])])
    return served
