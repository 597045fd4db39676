"""What a command says when the extra it needs is not installed."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from stagescope.errors import UsageError


@contextmanager
def needs(extra: str) -> Generator[None, None, None]:
    """Turn a failed import inside the block into a sentence that names the extra to install."""
    try:
        yield
    except ModuleNotFoundError as missing:
        if (missing.name or "").partition(".")[0] == "stagescope":
            raise
        raise UsageError(
            f"this needs {missing.name}, which is not installed: pip install 'stagescope[{extra}]'"
        ) from missing
