"""What `/proc` tells of a process (Linux), read with the standard library alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def stat_fields(line: bytes) -> list[bytes]:
    """Return the fields of a line of `/proc/PID/stat` from the third, the state, on."""
    # The name, field 2, stands in brackets and may hold anything, brackets too.
    return line.rpartition(b")")[2].split()


def parent_pid(process: Path) -> int:
    """Return the parent of the process of a folder `/proc/PID`; 0 where that cannot be read."""
    try:
        return int(stat_fields((process / "stat").read_bytes())[1])
    except (OSError, ValueError, IndexError):
        return 0


def open_files(process: Path) -> Iterator[tuple[str, str]]:
    """Yield descriptor and target of each file that a process holds open.

    Raises OSError where the process is gone, or another user's.
    """
    for name in os.listdir(process / "fd"):
        with suppress(FileNotFoundError):  # closed meanwhile
            yield name, os.readlink(process / "fd" / name)
