"""The spool: one folder in which served processes put recorder files and an agent finds them."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

from stagescope.errors import StagescopeError
from stagescope.recorder.format import SUFFIX

SPOOL_VARIABLE = "STAGESCOPE_SPOOL"
SOCKET_NAME = "agent.sock"
LOCK_NAME = "agent.lock"
PROBE_SUFFIX = ".probe"
"""Of the socket beside a recorder file, by which its process is asked things."""


def default_spool() -> Path:
    """Give the spool folder: `STAGESCOPE_SPOOL`, else one per user, in memory where there is such.

    Memory first, because a recorder file is written at every request and a disk would see it.
    """
    if named := os.environ.get(SPOOL_VARIABLE):
        return Path(named)
    if runtime := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(runtime) / "stagescope"
    shared_memory = Path("/dev/shm")
    parent = shared_memory if os.access(shared_memory, os.W_OK) else Path(tempfile.gettempdir())
    return parent / _own_name()


def _own_name() -> str:
    return f"stagescope-{os.getuid()}"


def ensure_spool(spool: Path) -> Path:
    """Make the folder, for its owner alone (0700), where it is missing.

    Raises StagescopeError where it cannot be made or written, or belongs to somebody else.
    """
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = spool.stat()
    except FileExistsError:
        raise StagescopeError(f"spool {spool} is a file; name a folder") from None
    except OSError as problem:
        raise StagescopeError(f"spool {spool} cannot be made: {problem.strerror}") from None
    # A folder for all may be shared between containers, but only by name: the default one lies
    # where anybody could have made it before us.
    shared = found.st_mode & stat.S_IWOTH and spool.name != _own_name()
    if found.st_uid != os.getuid() and not shared and os.getuid() != 0:
        raise StagescopeError(
            f"spool {spool} belongs to uid {found.st_uid}, not to you; name another with "
            f"{SPOOL_VARIABLE}"
        )
    if not os.access(spool, os.W_OK | os.X_OK):
        raise StagescopeError(f"spool {spool} is not writable; name another with {SPOOL_VARIABLE}")
    return spool


def ring_files(spool: Path) -> list[Path]:
    """Give the recorder files in *spool*, oldest first; none where there is no such folder."""
    found: list[tuple[int, str]] = []
    with suppress(FileNotFoundError), os.scandir(spool) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with suppress(FileNotFoundError):  # Deleted by an agent while we look.
                    found.append((entry.stat().st_mtime_ns, entry.path))
    return [Path(path) for _, path in sorted(found)]


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock on an open file without waiting; False where somebody else has it.

    It is `flock`: the kernel lets go when the holder's last descriptor is closed, so also
    when it is killed, and it works between containers that share the folder, where a pid
    says nothing.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
