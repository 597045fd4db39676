"""Makes a recorder file: its space reserved, its header complete, its lock held, then its name."""

from __future__ import annotations

import mmap
import os
import platform
import socket
import zlib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from stagescope.errors import StagescopeError
from stagescope.recorder import format as fmt
from stagescope.recorder.spool import PROBE_SUFFIX, ensure_spool, ring_files, try_lock
from stagescope.runfolder.run import boot_id

MOST_LEFT_BEHIND = 32
"""Files of dead processes that may lie in a spool which no agent reads; the oldest go first."""


@dataclass(frozen=True, slots=True)
class RecorderFile:
    """An open recorder file; the lock, and with it the sign of life, lasts as long as *fd*."""

    path: Path
    fd: int
    memory: mmap.mmap


def create_recorder_file(
    spool: Path,
    service: str,
    *,
    in_flight_slots: int = fmt.IN_FLIGHT_SLOTS,
    ring_slots: int = fmt.RING_SLOTS,
) -> RecorderFile:
    """Make a new file in *spool* for this process.

    Raises StagescopeError where the spool cannot be written or has no room.
    """
    sweep(ensure_spool(spool))
    ring_id = os.urandom(16)
    path = spool / f"{os.getpid()}-{ring_id.hex()[:8]}{fmt.SUFFIX}"
    part = path.with_suffix(".part")
    size = fmt.file_bytes(in_flight_slots, ring_slots)
    try:
        fd = os.open(part, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as problem:
        raise StagescopeError(f"no recorder file in {spool}: {problem.strerror}") from None
    try:
        _reserve(fd, size)
        # Populated, where that can be asked for: a page fault costs as much as two stages.
        memory = mmap.mmap(fd, size, mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0))
        memory[: fmt.NAMES_AT] = _header(ring_id, service, in_flight_slots, ring_slots).ljust(
            fmt.NAMES_AT, b"\0"
        )
        try_lock(fd)
        os.rename(part, path)
    except OSError as problem:
        os.close(fd)
        part.unlink(missing_ok=True)
        raise StagescopeError(
            f"no recorder file of {size} bytes in {spool}: {problem.strerror}"
        ) from None
    return RecorderFile(path, fd, memory)


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
        _cut(_own_version(), 24), _cut(platform.python_version(), 24),
    )  # fmt: skip
    return header + zlib.crc32(header).to_bytes(4, "little")


def _cut(text: str, size: int) -> bytes:
    """Encode *text* to at most *size* bytes of whole characters."""
    return text.encode("utf-8", "replace")[:size].decode("utf-8", "ignore").encode()


def _own_version() -> str:
    try:
        return version("stagescope")
    except PackageNotFoundError:
        return "0"


def sweep(spool: Path) -> None:
    """Delete the oldest files of dead processes, beyond a number, where no agent does it."""
    files = ring_files(spool)
    for path in files[: max(0, len(files) - MOST_LEFT_BEHIND)]:
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue  # Somebody else was faster.
        try:
            if try_lock(fd):
                path.unlink(missing_ok=True)
                path.with_suffix(PROBE_SUFFIX).unlink(missing_ok=True)
        finally:
            os.close(fd)
