"""Brings the queue's waiting times into records that the worker has finished and still holds."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from dataclasses import dataclass, field

from stagescope.middleware.guard import guarded
from stagescope.middleware.held import Held, Late
from stagescope.middleware.hooks.torchserve_log import FollowedLog, Waited, WaitLines, find_log
from stagescope.middleware.names import CODES
from stagescope.middleware.recorder import Recorder

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
    held: Held
    queue_index: int
    wait_index: int
    wait_ns: int | None = None
    settled: bool = False


@dataclass(slots=True)
class HeldBatch:
    """A served batch with its members: complete but for their waiting."""

    recorder: Recorder
    held: Held
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
                        "in the records; said once")  # fmt: skip
        return True
