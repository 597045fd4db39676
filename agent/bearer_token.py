"""The bearer token of the control API over TCP."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from stagescope.errors import StagescopeError, UsageError

FILE_NAME = "agent.token"


def read_token(path: Path) -> str:
    """Read a token file; raises UsageError where it is missing, empty, or holds odd characters."""
    try:
        token = path.read_text("ascii").strip()
    except (OSError, UnicodeDecodeError) as problem:
        raise UsageError(f"token file {path} cannot be read: {problem}") from None
    if not token or not token.isprintable() or " " in token:
        raise UsageError(f"token file {path} holds no token: write one word of plain characters")
    return token


def make_token(spool: Path) -> tuple[str, Path]:
    """Make a token and keep it in the spool, for its owner alone (0600)."""
    path, token = spool / FILE_NAME, secrets.token_urlsafe(24)
    try:
        path.unlink(missing_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(fd, "w") as file:
            file.write(token + "\n")
    except OSError as problem:
        raise StagescopeError(f"token file {path} cannot be written: {problem.strerror}") from None
    return token, path
