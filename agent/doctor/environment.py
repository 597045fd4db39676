"""Where the doctor looks: the spool, the served processes in it, and the roots of /proc and /sys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from stagescope.agent.probe import probe_of
from stagescope.errors import RecorderFileError, StagescopeError
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import default_spool, ring_files
from stagescope.records import Process


@dataclass(frozen=True, slots=True)
class Served:
    """A live process that writes into the spool."""

    ring: Path
    process: Process

    @property
    def probe(self) -> Path:
        """Its probe's socket."""
        return probe_of(self.ring)


@dataclass(frozen=True, slots=True)
class Environment:
    """What every check looks at."""

    spool: Path
    served: tuple[Served, ...] = ()
    closed: tuple[Path, ...] = ()
    """Recorder files that are not ours to read."""
    pid: int = 0
    """The process that was asked about; 0: none, so all that are served."""
    environment: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    proc: Path = Path("/proc")
    sys: Path = Path("/sys")

    def pids(self) -> list[int]:
        """Return the processes to look at: the one asked about, else those that are served."""
        return [self.pid] if self.pid else [one.process.pid for one in self.served]

    def read(self, path: Path) -> str:
        """Return a small file's text; empty where it is not there or not to be read."""
        try:
            return path.read_text("utf-8", "replace").strip()
        except OSError:
            return ""

    def environment_of(self, pid: int) -> dict[str, str]:
        """Return the environment that a process was started with; empty where it is not for us."""
        pairs = self.read(self.proc / str(pid) / "environ").split("\0")
        return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def look_around(
    spool: Path | None = None,
    pid: int = 0,
    *,
    proc: Path = Path("/proc"),
    sys: Path = Path("/sys"),
    environment: Mapping[str, str] = os.environ,
) -> Environment:
    """Find out what there is to look at. Raises StagescopeError where *pid* is not here."""
    spool = spool or default_spool()
    found, closed = _rings(spool)
    served = tuple(one for one in found if pid in (0, one.process.pid))
    if pid and not (proc / str(pid)).exists():
        raise StagescopeError(
            f"there is no process {pid} here: it has ended, or lives in another PID namespace; "
            "share that one (`docker run --pid=container:NAME`, `shareProcessNamespace: true` of "
            "a pod), or run the doctor inside it"
        )
    return Environment(spool, served, tuple(closed), pid, dict(environment), proc, sys)


def _rings(spool: Path) -> tuple[list[Served], list[Path]]:
    """Return the live processes that write there, and the files that we may not read."""
    found: list[Served] = []
    closed: list[Path] = []
    with suppress(OSError):
        for ring in ring_files(spool):
            try:
                reader = RecorderReader(ring)
            except PermissionError:
                closed.append(ring)
            except (OSError, RecorderFileError):
                continue
            else:
                if reader.writer_alive():
                    found.append(Served(ring, reader.process))
                reader.close()
    return found, closed
