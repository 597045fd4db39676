"""Source files of other processes, as those see them, read once as long as they do not change."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stagescope.agent.stage_blocks import Source, read_source

MOST_FILES = 4000
MAX_BYTES = 4 << 20
NONE = Source()


@dataclass(frozen=True, slots=True)
class _Read:
    mtime_ns: int
    size: int
    source: Source


class SourceFiles:
    """Gives what is known of a process's source file; what cannot be read tells nothing."""

    def __init__(self) -> None:
        self._read: dict[str, _Read] = {}

    def of(self, pid: int, files: Iterable[str]) -> dict[str, Source]:
        """Give by name what *files*, as frames of process *pid* name them, tell of their lines."""
        root, folder = _root(pid), _folder(pid)
        return {
            file: self._source(f"{root}{os.path.join(folder, file)}")
            if file and not file.startswith("<")
            else NONE
            for file in files
        }

    def _source(self, path: str) -> Source:
        try:
            status = os.stat(path)
            known = self._read.get(path)
            if known and (known.mtime_ns, known.size) == (status.st_mtime_ns, status.st_size):
                return known.source
            source = NONE if status.st_size > MAX_BYTES else read_source(Path(path).read_bytes())
        except (OSError, ValueError):  # a name with a null byte is a ValueError
            return NONE
        if len(self._read) >= MOST_FILES:
            self._read.clear()
        self._read[path] = _Read(status.st_mtime_ns, status.st_size, source)
        return source


def _root(pid: int) -> str:
    """Give what stands before a path of process *pid* here: nothing where its mounts are ours."""
    try:
        same = os.stat(f"/proc/{pid}/ns/mnt").st_ino == os.stat("/proc/self/ns/mnt").st_ino
    except OSError:  # gone, or another user's: then the path as it stands may still be right
        return ""
    return "" if same else f"/proc/{pid}/root"


def _folder(pid: int) -> str:
    """Give the folder in which process *pid* works; the root where that cannot be read."""
    try:
        return os.readlink(f"/proc/{pid}/cwd")
    except OSError:
        return "/"
