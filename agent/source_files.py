"""Source files of other processes, as those see them, read once as long as they do not change."""

from __future__ import annotations

import os
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

    def of(self, pid: int, file: str) -> Source:
        """Give what *file*, as frames of process *pid* name it, tells of its lines."""
        if not file or file.startswith("<"):
            return NONE
        path = _path(pid, file)
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


def _path(pid: int, file: str) -> str:
    """Find *file* from here: by the process's own root where its mounts are not ours."""
    try:
        if not file.startswith("/"):
            file = os.path.join(os.readlink(f"/proc/{pid}/cwd"), file)
        if os.stat(f"/proc/{pid}/ns/mnt").st_ino != os.stat("/proc/self/ns/mnt").st_ino:
            return f"/proc/{pid}/root{file}"
    except OSError:  # gone, or another user's: then the path as it stands may still be right
        pass
    return file
