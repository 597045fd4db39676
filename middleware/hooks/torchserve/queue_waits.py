"""Brings the queue's waiting times into records that the worker has finished and still holds."""

from __future__ import annotations

import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from stagescope import settings
from stagescope.middleware.recording.deferred import DeferredRecord, Late
from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.names import CODES
from stagescope.middleware.recording.recorder import Recorder
from stagescope.proc import open_files, parent_pid

# How long each request waited in TorchServe's queue, read from the front end's own log.
#
# TorchServe tells it nowhere else by request: its metrics are sums, or have no id. The Java thread
# of each worker writes two lines a request, after the response (or the error) was handed over:
#
#     W-9000-m_1.0 org.pytorch.serve.wlm.BatchAggregator - Sending response for jobId 0b9f...
#     W-9000-m_1.0 org.pytorch.serve.job.RestJob - Waiting time ns: 1234567, Backend time ns: 89
#
# Where the batch failed there is no first line, and the second says `Inference time ns`; the errors
# come in the order of the batch. As TorchServe is delivered its log holds each line twice, one after
# the other: its logger and the root logger both write there.


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
        """Yield what the complete lines say; a line that is cut off waits for its rest."""
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
        """Return what is new; raises OSError where the file is gone."""
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
        """Close the file."""
        os.close(self._fd)


def find_log(pid: int | None = None, proc: Path = Path("/proc")) -> Path | None:
    """Find the log that the front end, an ancestor of process *pid* (we), holds open."""
    if named := settings.TORCHSERVE_LOG.text():
        return Path(named) if Path(named).is_file() else None
    ancestor = pid or os.getpid()
    for _ in range(ANCESTORS):
        ancestor = parent_pid(proc / str(ancestor))
        if ancestor <= 1:
            break
        if found := _open_log(proc / str(ancestor)):
            return found
    folder = Path(os.environ.get("LOG_LOCATION", "logs"))
    return folder / LOG_NAME if (folder / LOG_NAME).is_file() else None


def _open_log(process: Path) -> Path | None:
    with suppress(OSError):
        for _, target in open_files(process):
            path = Path(target)
            if path.name == LOG_NAME and path.is_file():
                return path
    return None


log = logging.getLogger("stagescope")

LOOK_S = 0.02
"""How often the log is looked at while records wait for it."""
PATIENCE_NS = 2_000_000_000
"""How long a record waits for its line; then it goes without."""
MOST_HELD = 64
"""Batches that may wait at once; beyond it the oldest goes without."""

_QUEUE = CODES["queue.batch"]
_WAIT = CODES["batch.wait"]


@dataclass(slots=True)
class HeldMember:
    """One request of a served batch."""

    job_id: str
    held: DeferredRecord
    queue_index: int
    wait_index: int
    wait_ns: int | None = None
    settled: bool = False


@dataclass(slots=True)
class HeldBatch:
    """A served batch with its members: complete but for their waiting."""

    recorder: Recorder
    held: DeferredRecord
    wait_index: int
    arrived_ns: int
    """When it reached the worker; for TorchServe, when it was closed."""
    free_ns: int
    """Since when the worker was free; 0: always."""
    ended_ns: int
    failed: bool
    members: list[HeldMember] = field(default_factory=list)

    def take(self, waited: Waited) -> bool:
        """Note what the log says of one member; False where it is none of these."""
        for member in self.members:
            if member.settled:
                continue
            if waited.job_id == member.job_id or (not waited.job_id and self.failed):
                member.settled = True
                member.wait_ns = waited.wait_ns
                return True
        return False

    @property
    def settled(self) -> bool:
        """True where nothing more is to come."""
        return all(member.settled for member in self.members)

    def release(self) -> None:
        """Commit all records, with the waiting that is known."""
        waits = [member.wait_ns for member in self.members if member.wait_ns is not None]
        formed_ns = self.arrived_ns
        if waits:
            formed_ns = max(min(self.free_ns, self.arrived_ns), self.arrived_ns - max(waits))
        for member in self.members:
            member.held.release(*self._waiting(member, formed_ns))
        late = Late(self.wait_index, _WAIT, formed_ns, self.arrived_ns)
        self.held.release(formed_ns, (late,) if waits else ())

    def _waiting(self, member: HeldMember, formed_ns: int) -> tuple[int, tuple[Late, ...]]:
        if member.wait_ns is None:
            return self.arrived_ns, ()
        came_ns = self.arrived_ns - member.wait_ns
        late = []
        if came_ns < formed_ns:
            late.append(Late(member.queue_index, _QUEUE, came_ns, formed_ns))
        late.append(Late(member.wait_index, _WAIT, max(came_ns, formed_ns), self.arrived_ns))
        return came_ns, tuple(late)


class Waits:
    """Holds batches until the log has told how long their members waited; on a thread of its own.

    The thread sleeps while nothing is held.
    """

    def __init__(self, thread: str) -> None:
        self._lines = WaitLines(thread)
        self._held: deque[HeldBatch] = deque()
        self._lock = threading.Lock()
        self._some = threading.Event()
        self._said = False
        self._file = self._open()
        self._thread = threading.Thread(target=self._run, name="stagescope-torchserve", daemon=True)
        if self._file is not None:
            self._thread.start()

    def _open(self) -> FollowedLog | None:
        path = find_log()
        try:
            if path is not None:
                return FollowedLog(path)
        except OSError as problem:
            log.warning("stagescope: %s: %s", path, problem.strerror)
        log.warning("stagescope: TorchServe's log is not found, so the time in its queue is not in "
                    "the records; name it with STAGESCOPE_TORCHSERVE_LOG")  # fmt: skip
        return None

    def begin(self) -> None:
        """Say that a batch came: what the log holds so far is of no interest if none is held."""
        with self._lock:
            if self._file is not None and not self._held:
                self._file.skip_to_end()

    def hold(self, batch: HeldBatch) -> None:
        """Keep *batch* until its lines have come; call it before the response is sent."""
        with self._lock:
            if self._file is None:
                batch.release()
                return
            self._held.append(batch)
            if len(self._held) > MOST_HELD:
                self._held.popleft().release()
        self._some.set()

    def close(self) -> None:
        """Hold nothing any more; what is held goes as it is."""
        with self._lock:
            self._let_go()
        self._some.set()
        if self._thread.is_alive():
            self._thread.join()

    def _let_go(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        while self._held:
            self._held.popleft().release()

    def _run(self) -> None:
        while self._file is not None:
            self._some.wait()
            time.sleep(LOOK_S)
            with self._lock, guarded():
                self._look(time.monotonic_ns())

    def _look(self, now_ns: int) -> None:
        if self._file is None:
            return
        try:
            piece = self._file.read()
        except OSError as problem:
            log.warning("stagescope: %s: %s", self._file.path, problem.strerror)
            self._let_go()
            return
        for waited in self._lines.feed(piece):
            any(batch.take(waited) for batch in self._held)
        while self._held and self._is_due(self._held[0], now_ns):
            self._held.popleft().release()
        if not self._held:
            self._some.clear()

    def _is_due(self, batch: HeldBatch, now_ns: int) -> bool:
        if batch.settled:
            return True
        if now_ns - batch.ended_ns < PATIENCE_NS:
            return False
        if not self._said:
            self._said = True
            log.warning("stagescope: TorchServe's log does not tell how long some requests waited "
                        "(does org.pytorch.serve log at DEBUG, as by default?): their queue is not "
                        "in the records; logged once")  # fmt: skip
        return True
