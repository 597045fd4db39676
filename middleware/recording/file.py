"""Makes a recorder file: its space reserved, its header complete, its lock held, then its name."""

from __future__ import annotations

import mmap
import os
import platform
import socket
import stat
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stagescope.errors import StagescopeError
from stagescope.identity import boot_id, own_version
from stagescope.recorder import format as fmt
from stagescope.recorder.spool import (
    PROBE_SUFFIX,
    affordable_ring_slots,
    ensure_spool,
    is_held,
    open_to_read,
    opened_spool,
    try_lock,
)

MOST_LEFT_BEHIND = 32
"""Files of dead processes that may lie in a spool which no agent reads; the oldest go first."""
MOST_UNREAD = 128
"""The same where an agent reads it, and is behind."""


@dataclass(frozen=True, slots=True)
class RecorderFile:
    """An open recorder file; the lock, which proves that the process lives, lasts as long as *fd*."""

    path: Path
    fd: int
    memory: mmap.mmap
    ring_slots: int
    swept: int
    """Unread files of dead processes that were deleted to make room."""


def create_recorder_file(
    spool: Path,
    service: str,
    *,
    in_flight_slots: int = fmt.IN_FLIGHT_SLOTS,
    ring_slots: int | None = None,
) -> RecorderFile:
    """Make a new file in *spool* for this process; without *ring_slots* as large as there is room.

    Raises StagescopeError where the spool cannot be written or has no room.
    """
    with opened_spool(ensure_spool(spool)) as folder:
        try:
            swept = sweep(folder)
            room = os.fstatvfs(folder)
            ring_slots = ring_slots or affordable_ring_slots(room, in_flight_slots)
            if not ring_slots:
                raise StagescopeError(
                    f"no recorder file in {spool}: {room.f_bavail * room.f_frsize / 1e6:.1f} MB are "
                    "free there, which are left to others"
                )
            return _create(spool, folder, service, in_flight_slots, ring_slots, swept)
        except OSError as problem:
            raise StagescopeError(f"no recorder file in {spool}: {problem.strerror}") from None


def _create(
    spool: Path, folder: int, service: str, in_flight_slots: int, ring_slots: int, swept: int
) -> RecorderFile:
    ring_id = os.urandom(16)
    name = f"{os.getpid()}-{ring_id.hex()[:8]}{fmt.SUFFIX}"
    part = f"{name.removesuffix(fmt.SUFFIX)}.part"
    size = fmt.file_bytes(in_flight_slots, ring_slots)
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(part, flags, 0o600, dir_fd=folder)
    try:
        _reserve(fd, size)
        # Populated, where that can be asked for: a page fault costs as much as two stages.
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        memory[: fmt.NAMES_AT] = _header(ring_id, service, in_flight_slots, ring_slots).ljust(
            fmt.NAMES_AT, b"\0"
        )
        try_lock(fd)
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as problem:
        os.close(fd)
        with suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise StagescopeError(
            f"no recorder file of {size} bytes in {spool}: {problem.strerror}"
        ) from None
    return RecorderFile(spool / name, fd, memory, ring_slots, swept)


def _reserve(fd: int, size: int) -> None:
    # Reserved, not sparse: a full disk must show here and not as SIGBUS in a request.
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)


def _header(ring_id: bytes, service: str, in_flight_slots: int, ring_slots: int) -> bytes:
    header = fmt.HEADER.pack(
        fmt.MAGIC, fmt.VERSION, 0, fmt.DATA_AT, fmt.SLOT_BYTES, in_flight_slots, ring_slots,
        fmt.NAME_CAPACITY, fmt.file_bytes(in_flight_slots, ring_slots), os.getpid(), 0, ring_id,
        boot_id().encode(), _cut(socket.gethostname(), 64), _cut(service, 128),
        _cut(own_version(), 24), _cut(platform.python_version(), 24),
    )  # fmt: skip
    return header + zlib.crc32(header).to_bytes(4, "little")


def _cut(text: str, size: int) -> bytes:
    """Encode *text* to at most *size* bytes of whole characters."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").encode()


def sweep(folder: int) -> int:
    """Delete the oldest files of dead processes, beyond a number; return how many.

    *folder* is the descriptor of an opened spool.
    """
    dead = [name for name in _own_ring_files(folder) if _is_dead(folder, name)]
    most = MOST_UNREAD if is_held(folder) else MOST_LEFT_BEHIND
    return sum(_is_dead(folder, name, delete=True) for name in dead[: max(0, len(dead) - most)])


def _own_ring_files(folder: int) -> list[str]:
    """Return the names of this user's recorder files, oldest first."""
    found: list[tuple[int, str]] = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.endswith(fmt.SUFFIX):
                with suppress(OSError):  # Deleted by an agent while we look.
                    status = entry.stat(follow_symlinks=False)
                    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                        found.append((status.st_mtime_ns, entry.name))
    return [name for _, name in sorted(found)]


def _is_dead(folder: int, name: str, *, delete: bool = False) -> bool:
    """Return whether nobody holds the file, and *delete* it then."""
    try:
        fd = open_to_read(folder, name)
    except OSError:
        return False  # Somebody else was faster.
    try:
        if not try_lock(fd):
            return False
        if delete:
            os.unlink(name, dir_fd=folder)
            with suppress(FileNotFoundError):
                os.unlink(name.removesuffix(fmt.SUFFIX) + PROBE_SUFFIX, dir_fd=folder)
        return True
    except OSError:
        return False
    finally:
        os.close(fd)
