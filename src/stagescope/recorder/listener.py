"""The spool of the process that listens on a port of this host, by its open recorder file in /proc."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from stagescope.proc import open_files, parent_pid
from stagescope.recorder.format import SUFFIX

_LISTENS = "0A"
_DELETED = " (deleted)"
_POLL_S = 0.1


@dataclass(frozen=True, slots=True)
class ListenerSpool:
    """What `spool_of_listener` found about a port."""

    pids: tuple[int, ...] = ()
    """The processes that listen there, and their children; empty: none of this host that we see."""
    spool: Path | None = None
    """The spool into which most of them record, as it is reached from here; None: into none."""
    deleted: bool = False
    """Their recorder files were deleted while they are still written to."""
    closed: bool = False
    """Not all of these processes may be looked into: they are another user's."""


def spool_of_listener(
    port: int, *, wait_s: float = 0.0, proc: Path = Path("/proc")
) -> ListenerSpool:
    """Return the spool that the server on *port* of this host records into (Linux; else nothing).

    The server's children are looked at too: a front end listens, its workers record. Where none
    has a recorder file it is looked for again until *wait_s* is over, since a server that was
    just started or that hands over to new workers (gunicorn's reload) opens it a little later.
    Processes in other network namespaces are not seen.
    """
    deadline = time.monotonic() + wait_s
    while True:
        found = _look(port, proc)
        if (found.spool and not found.deleted) or time.monotonic() >= deadline:
            return found
        time.sleep(_POLL_S)


def _look(port: int, proc: Path) -> ListenerSpool:
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port, proc)}
    if not sockets:
        return ListenerSpool()
    links: dict[int, list[tuple[str, str]]] = {}
    parents: dict[int, int] = {}
    unreadable: set[int] = set()
    for pid in _pids(proc):
        parents[pid] = parent_pid(proc / str(pid))
        try:
            links[pid] = list(open_files(proc / str(pid)))
        except PermissionError:
            unreadable.add(pid)
        except OSError:
            continue  # It ended while we looked.
    listening = {
        pid for pid, open_files in links.items() if any(to in sockets for _, to in open_files)
    }
    family = _with_descendants(listening, parents)
    spools: Counter[tuple[Path, bool]] = Counter()
    for pid in family:
        for fd, target in links.get(pid, ()):
            if target.removesuffix(_DELETED).endswith(SUFFIX):
                spools[_seen_from_here(proc / str(pid), fd, target)] += 1
    # A listener that is not ours to look into shows as a socket without a process.
    closed = bool(family & unreadable) or (not listening and bool(unreadable))
    living = [(many, spool) for (spool, deleted), many in spools.items() if not deleted]
    gone = [(many, spool) for (spool, deleted), many in spools.items() if deleted]
    best = max(living or gone, default=(0, None), key=lambda one: one[0])[1]
    return ListenerSpool(tuple(sorted(family)), best, bool(gone and not living), closed)


def _listening_inodes(port: int, proc: Path) -> Iterator[str]:
    for table in ("net/tcp", "net/tcp6"):
        with suppress(OSError):
            for line in (proc / table).read_text("ascii", "replace").splitlines()[1:]:
                fields = line.split()
                if (
                    len(fields) > 9
                    and fields[3] == _LISTENS
                    and int(fields[1].rpartition(":")[2], 16) == port
                ):
                    yield fields[9]


def _pids(proc: Path) -> Iterator[int]:
    with suppress(OSError):
        yield from (int(name) for name in os.listdir(proc) if name.isdecimal())


def _with_descendants(pids: set[int], parents: dict[int, int]) -> set[int]:
    family = set(pids)
    while more := {pid for pid, parent in parents.items() if parent in family} - family:
        family |= more
    return family


def _seen_from_here(process: Path, fd: str, target: str) -> tuple[Path, bool]:
    """Return the folder of a recorder file, and whether the file was deleted.

    A path of another mount namespace (a container's) is reached below the process's own root.
    """
    deleted = target.endswith(_DELETED)
    path = Path(target.removesuffix(_DELETED))
    if deleted:
        return path.parent, True
    with suppress(OSError):
        if path.exists() and not path.samefile(process / "fd" / fd):
            return Path(f"{process}/root{path.parent}"), False
        if not path.exists() and Path(f"{process}/root{path}").exists():
            return Path(f"{process}/root{path.parent}"), False
    return path.parent, False
