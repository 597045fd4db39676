"""Which served process a capture is of: found among the recorder files of the spool."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stagescope.errors import RecorderFileError, UsageError
from stagescope.recorder_reader import RecorderReader
from stagescope.records import Process
from stagescope.spool import SPOOL_VARIABLE, ring_files


@dataclass(frozen=True, slots=True)
class Target:
    """A live served process."""

    ring: Path
    process: Process
    in_flight: int
    """Requests that it is serving now."""


def find_target(spool: Path, pid: int | None, service: str | None) -> Target:
    """Give the process *pid*, or the busiest one of *service*, or of the only service there is.

    Raises UsageError, which says why there is none and what to do.
    """
    alive = list(_alive(spool))
    if pid is not None:
        return _of_pid(spool, alive, pid)
    services = sorted({one.process.service for one in alive})
    if service is None and len(services) > 1:
        raise UsageError(f"name one of {', '.join(services)} with --service, or a --pid")
    wanted = [one for one in alive if service in (None, one.process.service)]
    if not wanted:
        what = f"of service {service} " if service else ""
        others = f"; there is: {', '.join(services)}" if services else ""
        raise UsageError(
            f"no live process {what}records in {spool}{others}: "
            "is the server up and wrapped, and is this its spool (--spool)?"
        )
    return max(wanted, key=lambda one: (one.in_flight, one.process.pid))


def _alive(spool: Path) -> Iterator[Target]:
    for ring in ring_files(spool):
        with suppress(FileNotFoundError, RecorderFileError), RecorderReader(ring) as reader:
            if reader.writer_alive():
                yield Target(ring, reader.process, reader.requests_in_flight())


def _of_pid(spool: Path, alive: list[Target], pid: int) -> Target:
    inside = _pid_inside(pid)
    for one in alive:
        if one.process.pid == inside:
            return one
    raise UsageError(_why_not(spool, pid, inside))


def _pid_inside(pid: int) -> int:
    """Give the pid that a process has in its own namespace: what its recorder file says."""
    numbers = _status(pid, "NSpid").split()
    return int(numbers[-1]) if numbers else pid


def _why_not(spool: Path, pid: int, inside: int) -> str:
    folder = Path(f"/proc/{pid}")
    if pid <= 0 or not folder.exists():
        return f"there is no process {pid} here: it has ended, or has another pid in this container"
    owner = folder.stat().st_uid
    if owner != os.getuid() and os.getuid() != 0:
        return (
            f"process {pid} belongs to {_user(owner)}, not to you: run this as that user, "
            f"or name its spool with --spool if you may read it"
        )
    if not _runs_python(folder):
        return f"process {pid} ({_command(folder)}) is no Python process"
    if inside != pid:
        return (
            f"process {pid} runs in another pid namespace (it is {inside} there) and records "
            f"nothing in {spool}: name its spool, as it is seen from here, with --spool"
        )
    if (own := _variable(folder, SPOOL_VARIABLE)) and Path(own) != spool:
        return f"process {pid} records in {own}, not in {spool}: name that with --spool"
    return (
        f"process {pid} records nothing in {spool}: its app is not wrapped in StageMiddleware, "
        "or no worker of it is up yet; the workers of a server have pids of their own (--service)"
    )


def _status(pid: int, name: str) -> str:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return line.partition(":")[2].strip()
    return ""


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"


def _runs_python(folder: Path) -> bool:
    try:
        return "python" in (folder / "maps").read_text("utf-8", "replace")
    except OSError:
        return True  # it cannot be told; then it is not what is wrong


def _command(folder: Path) -> str:
    with suppress(OSError):
        return (folder / "comm").read_text().strip()
    return "unknown"


def _variable(folder: Path, name: str) -> str:
    with suppress(OSError):
        for entry in (folder / "environ").read_bytes().split(b"\0"):
            key, _, value = entry.partition(b"=")
            if key == name.encode():
                return value.decode(errors="replace")
    return ""
