"""The spool: one folder in which served processes put recorder files and an agent finds them.

Others may be able to write beside it (/dev/shm and /tmp are everybody's), or even into it. So a
folder is used only after its owner was checked, each file is opened by name below a descriptor of
that folder, and no symbolic link is followed.
"""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from stagescope import settings
from stagescope.errors import StagescopeError
from stagescope.recorder.format import IN_FLIGHT_SLOTS, RING_SLOTS, SUFFIX, file_bytes

SPOOL_VARIABLE = settings.SPOOL.name
SOCKET_NAME = "agent.sock"
LOCK_NAME = "agent.lock"
RUNS_FOLDER = "runs"
OPEN_RUN_SUFFIX = ".open"
"""`runs/RUN-ID.open` below the spool: a load driver that may write here has opened this run."""
EXPORTING_NAME = "exporting"
"""While spans are exported: a file with the endpoint's host, touched by the agent again and again."""
PROBE_SUFFIX = ".probe"
"""Of the socket beside a recorder file, by which its process is asked things."""

_SHARED_MEMORY = Path("/dev/shm")

_RING_CHOICES = (RING_SLOTS, RING_SLOTS // 2, RING_SLOTS // 4, RING_SLOTS // 8, RING_SLOTS // 16)
_SHARE_OF_FREE = 16
"""A recorder file takes at most this part of what is free: the next workers and others want some."""
_LEFT_TO_OTHERS_BYTES = 64 << 20
"""So much is never taken, a quarter of a smaller file system (Docker's /dev/shm has 64 MB)."""


def default_spool() -> Path:
    """Return the spool folder: `STAGESCOPE_SPOOL`, else the first usable of `default_spools`."""
    if named := settings.SPOOL.text():
        return Path(named)
    choices = default_spools()
    return next((spool for spool in choices if _usable(spool)), choices[0])


def default_spools() -> tuple[Path, ...]:
    """Return where a spool of this user may be when none is named, the first choice first.

    Memory comes first, because a recorder file is written at every request and a disk would see
    it; and the place that does not depend on the environment, so that a service, a login shell
    and `sudo` of one user agree. `XDG_RUNTIME_DIR` is set in some of these and not in others.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR") or f"/run/user/{os.geteuid()}"
    try:
        temporary = Path(tempfile.gettempdir())
    except OSError:  # No folder at all can be written.
        temporary = Path("/tmp")
    return (
        _SHARED_MEMORY / _own_name(),
        Path(runtime) / "stagescope",
        temporary / _own_name(),
    )


def _own_name() -> str:
    return f"stagescope-{os.geteuid()}"


def _usable(spool: Path) -> bool:
    try:
        found = spool.lstat()
    except FileNotFoundError:
        return spool.parent.is_dir() and os.access(spool.parent, os.W_OK | os.X_OK)
    except OSError:
        return False
    return _is_private(found) and os.access(spool, os.W_OK | os.X_OK)


def _is_private(found: os.stat_result) -> bool:
    """Return whether a folder is ours and nobody else can write into it."""
    others = stat.S_IWGRP | stat.S_IWOTH
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not (
        found.st_mode & others
    )  # fmt: skip


def ensure_spool(spool: Path) -> Path:
    """Make the folder, for its owner alone (0700), where it is missing.

    Raises StagescopeError where it cannot be made or written, or belongs to somebody else.
    """
    try:
        spool.mkdir(mode=0o700, parents=True, exist_ok=True)
    except FileExistsError:
        if not spool.is_symlink():
            raise StagescopeError(f"spool {spool} is a file; name a folder") from None
    except OSError as problem:
        if not spool.is_symlink():
            raise StagescopeError(f"spool {spool} cannot be made: {problem.strerror}") from None
    with opened_spool(spool):
        pass
    if not os.access(spool, os.W_OK | os.X_OK):
        raise StagescopeError(f"spool {spool} is not writable; name another with {SPOOL_VARIABLE}")
    return spool


@contextmanager
def opened_spool(spool: Path) -> Iterator[int]:
    """Open the folder: a descriptor below which its files are opened (`dir_fd`).

    Raises StagescopeError where it is not there or not safe: another user's, also for root,
    unless it was named and is meant for all (a volume that containers share).
    """
    by_default = spool.name == _own_name()
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (os.O_NOFOLLOW if by_default else 0)
    try:
        folder = os.open(spool, flags)
    except OSError as problem:
        cause = "it is a symbolic link" if spool.is_symlink() else problem.strerror
        raise StagescopeError(f"spool {spool} cannot be opened: {cause}") from None
    try:
        _check_owner(spool, os.fstat(folder), by_default=by_default)
        yield folder
    finally:
        os.close(folder)


def _check_owner(spool: Path, found: os.stat_result, *, by_default: bool) -> None:
    mine = found.st_uid == os.geteuid()
    if not mine and (by_default or not found.st_mode & stat.S_IWOTH):
        raise StagescopeError(
            f"spool {spool} belongs to uid {found.st_uid}, not to you (uid {os.geteuid()}); work "
            f"as that user (sudo -u '#{found.st_uid}'), or name another with {SPOOL_VARIABLE}"
        )
    if by_default and not _is_private(found):
        raise StagescopeError(
            f"spool {spool} may be written by others (mode {stat.S_IMODE(found.st_mode):o}); "
            f"`chmod 700 {spool}`, or name another with {SPOOL_VARIABLE}"
        )


def open_own(folder: int, name: str, flags: int) -> int:
    """Open, or make for its owner alone, a file that is to be written in an `opened_spool`.

    Raises OSError where it is a link, no regular file, another user's, or has a second name:
    then writing to it would change what somebody else chose.
    """
    safe = os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    fd = os.open(name, flags | safe, 0o600, dir_fd=folder)
    found = os.fstat(fd)
    mine = found.st_uid == os.geteuid() and found.st_nlink <= 1
    if not (mine and stat.S_ISREG(found.st_mode)):
        os.close(fd)
        raise PermissionError(1, "it is not this user's own file", name)
    return fd


def affordable_ring_slots(found: os.statvfs_result, in_flight_slots: int = IN_FLIGHT_SLOTS) -> int:
    """Return how many finished records a new recorder file may hold there; 0: there is no room."""
    whole, free = found.f_blocks * found.f_frsize, found.f_bavail * found.f_frsize
    if not whole:
        return RING_SLOTS  # A file system without a size (ramfs).
    left = min(whole // 4, _LEFT_TO_OTHERS_BYTES)
    for slots in _RING_CHOICES:
        size = file_bytes(in_flight_slots, slots)
        if size <= free // _SHARE_OF_FREE and free - size >= left:
            return slots
    return 0


def is_held(folder: int) -> bool:
    """Return whether an agent, embedded or not, drains the `opened_spool` *folder*."""
    try:
        fd = open_to_read(folder, LOCK_NAME)
    except OSError:
        return False
    try:
        return not try_lock(fd, shared=True)
    finally:
        os.close(fd)


def open_to_read(folder: int, name: str) -> int:
    """Open a file of an `opened_spool`; raises OSError for a link, and never waits for a pipe."""
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=folder)


def ring_files(spool: Path) -> list[Path]:
    """Return the recorder files in *spool*, oldest first; none where there is no such folder.

    What has such a name and is no regular file (a folder, a pipe, a link) is passed over.
    """
    found: list[tuple[int, str]] = []
    with suppress(FileNotFoundError), os.scandir(spool) as entries:
        for entry in entries:
            if entry.name.endswith(SUFFIX):
                with suppress(OSError):  # Deleted by an agent while we look.
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode):
                        found.append((status.st_mtime_ns, entry.path))
    return [Path(path) for _, path in sorted(found)]


def try_lock(fd: int, *, shared: bool = False) -> bool:
    """Take the lock on an open file without waiting; False where somebody else has it.

    It is `flock`: the kernel releases it when the holder's last descriptor is closed, so also
    when it is killed, and it works between containers that share the folder, where a pid
    says nothing.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def still_named(fd: int, path: Path) -> bool:
    """Return whether *path* is still the file that is open as *fd*: nobody deleted or replaced it."""
    try:
        return os.path.samestat(os.fstat(fd), path.lstat())
    except OSError:
        return False
