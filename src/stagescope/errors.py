"""Errors that a person meets: one sentence, one exit code, printed once by the CLI."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_HELD = 3


class StagescopeError(Exception):
    """Something failed; the text says what, where, and what to do about it."""

    exit_code = EXIT_FAILED


class UsageError(StagescopeError):
    """The command line, a parameter or a run is not usable as given."""

    exit_code = EXIT_USAGE


class HeldError(StagescopeError):
    """Somebody else holds what was asked for (a spool, a capture); the text names the holder."""

    exit_code = EXIT_HELD


class RecorderFileError(StagescopeError):
    """A recorder file cannot be read; the text names file, byte offset and cause."""


class MissingExtraError(UsageError, ImportError):
    """A package of an extra is not installed; the text says what to install."""


@contextmanager
def needs(extra: str) -> Generator[None, None, None]:
    """Turn a failed import inside the block into a sentence that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "stagescope":
            raise
        raise MissingExtraError(
            f"this needs {missing.name}, which is not installed: pip install 'stagescope[{extra}]'"
        ) from missing
