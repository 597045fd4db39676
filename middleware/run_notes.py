"""Notes that the processes of `stagescope run` leave for it: who came up, and who recorded.

One line an event, `WHAT PID`, appended to the file that the environment names; appends of that
size are atomic. Without `stagescope run` there is no such file and nothing is noted.
"""

from __future__ import annotations

import os

from stagescope import settings

PYTHON = "python"
"""A Python process has started."""
HOOK = "hook:"
"""A hook is installed; its name follows."""
RECORDER = "recorder"
"""A process has opened its recorder file."""


def note(what: str) -> None:
    """Append a note; where that is not possible, leave it."""
    path = settings.RUN_NOTES.text()
    if not path:
        return
    try:
        # Never made here: where `stagescope run` has ended, so has the file.
        fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.write(fd, f"{what} {os.getpid()}\n".encode())
    except OSError:
        pass
    finally:
        os.close(fd)
