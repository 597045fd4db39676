"""Who drains a spool: one lock file, one holder, and an embedded holder yields to an agent."""

from __future__ import annotations

import json
import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from stagescope.errors import HeldError, StagescopeError
from stagescope.recorder.spool import (
    LOCK_NAME,
    is_held,
    open_own,
    open_to_read,
    opened_spool,
    still_named,
    try_lock,
)

AGENT, EMBEDDED = "agent", "embedded"


class SpoolLock:
    """The right to drain a spool; ends with `release`, or with the process however it ends."""

    def __init__(self, fd: int, path: Path) -> None:
        self._fd = fd
        self._path = path

    def valid(self) -> bool:
        """Return whether the lock file is still there: without it another agent may drain too."""
        return self._fd >= 0 and still_named(self._fd, self._path)

    def release(self) -> None:
        """Release the spool for the next agent."""
        if self._fd >= 0:
            os.ftruncate(self._fd, 0)
        self.close_inherited()

    def close_inherited(self) -> None:
        """In a forked child: close the copy, which leaves the parent's hold as it is."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


def try_hold(spool: Path, kind: str) -> SpoolLock | None:
    """Take the spool if nobody has it; raises StagescopeError where the lock file can't be made."""
    path = spool / LOCK_NAME
    try:
        with opened_spool(spool) as folder:
            fd = open_own(folder, LOCK_NAME, os.O_RDWR)
    except OSError as problem:
        raise StagescopeError(f"lock file {path} cannot be opened: {problem.strerror}") from None
    try:
        # If somebody deleted the file meanwhile, another agent may hold the new one.
        if try_lock(fd) and still_named(fd, path):
            text = json.dumps({"pid": os.getpid(), "kind": kind, "since_s": time.time()})
            os.ftruncate(fd, 0)
            os.pwrite(fd, text.encode(), 0)
            return SpoolLock(fd, path)
    except OSError as problem:
        os.close(fd)
        raise StagescopeError(f"lock file {path} cannot be written: {problem.strerror}") from None
    os.close(fd)
    return None


def holder(spool: Path) -> dict[str, Any]:
    """Read who holds the spool: `pid`, `kind`, `since_s`; empty where that is unknown."""
    try:
        with opened_spool(spool) as folder, open(open_to_read(folder, LOCK_NAME), "rb") as file:
            found = json.loads(file.read(4096))
    except (OSError, ValueError, StagescopeError):
        return {}
    return found if isinstance(found, dict) else {}


def held(spool: Path) -> bool:
    """Return whether somebody drains *spool*; False also where it is not there or not for us."""
    try:
        with opened_spool(spool) as folder:
            return is_held(folder)
    except StagescopeError:
        return False


def held_error(spool: Path) -> HeldError:
    """Return an error that says who holds the spool."""
    found = holder(spool)
    if "pid" not in found:
        return HeldError(f"spool {spool} is held by another agent")
    since = datetime.fromtimestamp(found.get("since_s", 0), UTC)
    kind = "agent" if found.get("kind") == AGENT else "an embedded agent that does not yield,"
    return HeldError(
        f"spool {spool} is held by {kind} pid {found['pid']} (since {since:%Y-%m-%d %H:%M:%S} UTC)"
    )
