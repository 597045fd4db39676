"""Takes the notices that served processes leave in the spool: `notices/*.json`, one object each.

`{"kind": "oom", "pid": 4711, "at_ns": 123, "path": "/.../snapshot.pickle"}`; `sentence` may tell
more, and `why_no_path` why there is no path. A writer gives a file its name when it is whole. A spool may be shared by several
containers, so what lies there is read with care.
"""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from stagescope.agent.notices import KINDS, Notice, Notices

FOLDER: Final = "notices"
SUFFIX: Final = ".json"
BAD_SUFFIX: Final = ".bad"
MOST_AT_ONCE: Final = 32
MAX_BYTES: Final = 1 << 16


class NoticeFiles:
    """Reads and removes the notices of one spool; what is none is set aside as `*.bad`."""

    def __init__(self, notices: Notices, spool: Path) -> None:
        self.bad = 0
        self._notices = notices
        self._folder = spool / FOLDER

    def look(self, now_ns: int) -> None:
        """Take what is there, oldest first."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(SUFFIX))
        except OSError:
            return  # nobody has left one yet
        for name in names[:MOST_AT_ONCE]:
            self._take(self._folder / name)

    def _take(self, path: Path) -> None:
        try:
            self._notices.put(_read(path))
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            self.bad += 1
            with suppress(OSError):
                path.rename(path.with_suffix(BAD_SUFFIX))


def _read(path: Path) -> Notice:
    """Read one; raises ValueError or OSError for what is no notice."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("no file")
        said = json.loads(file.read(MAX_BYTES))
    if not isinstance(said, dict) or said.get("kind") not in KINDS:
        raise ValueError("no notice")
    pid, at_ns = int(said["pid"]), int(said["at_ns"])
    return Notice(str(said["kind"]), pid, str(said.get("device", "")), at_ns, _sentence(said))


def _sentence(said: dict[str, Any]) -> str:
    sentence = str(said.get("sentence") or f"process {said['pid']} told of {said['kind']}")
    if said.get("path"):
        return f"{sentence}; see {said['path']}"
    return f"{sentence}; {said['why_no_path']}" if said.get("why_no_path") else sentence
