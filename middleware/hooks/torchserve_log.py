"""How long each request waited in TorchServe's queue, read from the front end's own log.

TorchServe tells it nowhere else by request: its metrics are sums, or have no id. The Java thread
of each worker writes two lines a request, after the response (or the error) was handed over:

    W-9000-m_1.0 org.pytorch.serve.wlm.BatchAggregator - Sending response for jobId 0b9f...
    W-9000-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 1234567, Backend time ns: 89

Where the batch failed there is no first line, and the second says `Inference time ns`; the errors
come in the order of the batch. As TorchServe is delivered its log holds each line twice, one after
the other: its logger and the root logger both write there.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

LOG_VARIABLE = "STAGESCOPE_TORCHSERVE_LOG"
"""Names the front end's log where it is not TorchServe's own `ts_log.log`."""

LOG_NAME = "ts_log.log"
ANCESTORS = 5
"""How far up the front end is looked for: a launcher may stand between it and the worker."""

_LINE = re.compile(
    rb"Sending response for jobId (?P<job>\S+)"
    rb"|Waiting time ns: (?P<wait>\d+), (?:Backend|(?P<failed>Inference)) time ns: (?P<spent>\d+)"
    rb"|Drop (?:error )?response for inference request (?P<dropped>\S+)"
)


class Waited(NamedTuple):
    """What the log says of one request."""

    job_id: str
    """TorchServe's id of the request; empty where the batch failed: then the next in order."""
    wait_ns: int | None
    """From its arrival in the queue until its batch was closed; None where it was dropped."""


class WaitLines:
    """Takes the log in pieces as they come, and picks out the lines of one worker's thread."""

    def __init__(self, thread: str) -> None:
        self._thread = re.compile(rb"(?:^|\s)" + re.escape(thread.encode()) + rb"(?=[-\s])")
        self._rest = b""
        self._job = ""
        self._last = (b"", b"")

    def feed(self, piece: bytes) -> Iterator[Waited]:
        """Give what the complete lines say; a line that is cut off waits for its rest."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        for line in lines:
            found = _LINE.search(line)
            if found is None or not self._thread.search(line, 0, found.start()):
                continue
            if found["job"]:
                self._job = found["job"].decode("ascii", "replace")
            elif found["dropped"]:
                self._job = ""
                yield Waited(found["dropped"].decode("ascii", "replace"), None)
            else:
                job, self._job = self._job, ""
                last, self._last = self._last, (found["wait"], found["spent"])
                if self._last != last and bool(job) != bool(found["failed"]):
                    yield Waited(job, int(found["wait"]))


class FollowedLog:
    """The log's file, read on from where it ended; rolled files are followed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def skip_to_end(self) -> None:
        """Leave out what is there already."""
        self._follow()
        os.lseek(self._fd, 0, os.SEEK_END)

    def read(self) -> bytes:
        """Give what is new; raises OSError where the file is gone."""
        piece = self._rest()
        if self._follow():
            piece += self._rest()
        return piece

    def _rest(self) -> bytes:
        pieces = []
        while piece := os.read(self._fd, 1 << 18):
            pieces.append(piece)
        return b"".join(pieces)

    def _follow(self) -> bool:
        """Take up the new file where the log was rolled."""
        try:
            there = os.stat(self.path)
        except FileNotFoundError:
            return False  # Between renaming and making the new one.
        if os.path.samestat(there, os.fstat(self._fd)):
            return False
        fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        os.close(self._fd)
        self._fd = fd
        return True

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._fd)


def find_log(pid: int | None = None, proc: Path = Path("/proc")) -> Path | None:
    """Find the log that the front end, an ancestor of process *pid* (we), holds open."""
    if named := os.environ.get(LOG_VARIABLE):
        return Path(named) if Path(named).is_file() else None
    ancestor = pid or os.getpid()
    for _ in range(ANCESTORS):
        ancestor = _parent(proc / str(ancestor))
        if ancestor <= 1:
            break
        if found := _open_log(proc / str(ancestor) / "fd"):
            return found
    folder = Path(os.environ.get("LOG_LOCATION", "logs"))
    return folder / LOG_NAME if (folder / LOG_NAME).is_file() else None


def _parent(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError, IndexError):
        return 0


def _open_log(descriptors: Path) -> Path | None:
    try:
        links = list(descriptors.iterdir())
    except OSError:
        return None
    for link in links:
        try:
            target = Path(os.readlink(link))
        except OSError:
            continue  # Closed meanwhile.
        if target.name == LOG_NAME and target.is_file():
            return target
    return None
