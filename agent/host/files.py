"""Small files that the kernel writes while they are read; what cannot be read is None."""

from __future__ import annotations

import os
import re

_PAIR = re.compile(rb"^([\w.]+):?[ \t]+(\d+)(?: kB)?$", re.MULTILINE)
_BITE = 1 << 16


def read(path: str) -> bytes | None:
    """Give what stands in the file *path*; None where it is missing, denied or its owner gone."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (OSError, ValueError):
        return None
    try:
        found = os.read(fd, _BITE)
        # One read gives a small file whole; procfs gives long ones page by page.
        while found and (more := os.read(fd, _BITE)):
            found += more
        return found
    except OSError:
        return None
    finally:
        os.close(fd)


def count(text: bytes | None) -> int | None:
    """Give the count that a file holds; None for a word such as `max`."""
    word = (text or b"").strip()
    return int(word) if word.isdigit() and len(word) < 20 else None


def counts(text: bytes | None) -> dict[str, int]:
    """Give the counts of a file with one name and one count a line (`cpu.stat`, `/proc/PID/io`)."""
    return {name.decode(): int(n) for name, n in _PAIR.findall(text or b"") if len(n) < 20}
