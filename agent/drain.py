"""Tails every recorder file of a spool: finds new ones, reads them in batches, removes the files of exited processes."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Final

from stagescope.agent.probe import probe_of
from stagescope.errors import RecorderFileError
from stagescope.files import replace_file
from stagescope.recorder import format as fmt
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import open_to_read, opened_spool, ring_files
from stagescope.records import InstrumentCost, Process, Record

FILE_NAME = "agent.cursors"

LONGEST: Final = tuple(name for name in fmt.WAITS if name.endswith("_max") or "_max_" in name)
"""Of several processes the largest counts."""
PASSING: Final = ("pool_threads", "pool_busy", "pool_waiting", *LONGEST)
"""Dropped when a process exits."""
GROWING: Final = tuple(name for name in fmt.WAITS if name not in PASSING)

_log = logging.getLogger("stagescope")


def summed(waits: Iterable[Mapping[str, int]], names: Iterable[str]) -> dict[str, int]:
    """Add up *waits* of several processes, by each of *names*."""
    every = list(waits)
    sums: dict[str, int] = {}
    for name in names:
        figures = [figures.get(name, 0) for figures in every]
        sums[name] = max(figures, default=0) if name in LONGEST else sum(figures)
    return sums


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in one recorder file, and what was lost before it: see RecorderReader."""

    next_seq: int
    chains_from: int
    overwritten: int = 0
    lost: int = 0


Cursors = dict[str, Cursor]
"""By ring id."""


def load_cursors(spool: Path) -> Cursors:
    """Read what the last agent saved; empty where there was none.

    A file that cannot be read is set aside and logged: better records twice than none.
    """
    path = spool / FILE_NAME
    try:
        with opened_spool(spool) as folder, open(open_to_read(folder, FILE_NAME), "rb") as file:
            saved = json.loads(file.read())
        return {ring: Cursor(*map(int, place)) for ring, place in saved.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, IndexError, KeyError, AttributeError) as problem:
        aside = path.with_suffix(".broken")
        path.replace(aside)
        _log.warning(
            "cursor file %s cannot be read (%s): every recorder file is read again from its "
            "start, the file is kept as %s", path, problem, aside.name,
        )  # fmt: skip
        return {}


def save_cursors(spool: Path, cursors: Cursors) -> None:
    """Replace the file at once, so that a reader sees the old or the new; raises OSError."""
    text = json.dumps({ring: astuple(at) for ring, at in cursors.items()})
    with opened_spool(spool) as folder:
        replace_file(Path(FILE_NAME), text, folder=folder)


Deliver = Callable[[Sequence[Record]], None]
Note = Callable[[str, Cursor], None]
"""Takes a ring id and how far that file is read."""

RECALLED_SLOTS = 2048
"""How far before its place an agent looks for batches whose members may still come."""

FULL_BATCH = 64
"""Records read at once by an agent that has a process of its own; its place is noted after each."""
TURN = 64 * FULL_BATCH
"""Records read of one file before the next file has its turn."""


@dataclass(slots=True)
class Ring:
    """One recorder file that is being read."""

    path: Path
    reader: RecorderReader
    process: Process
    dead: bool = False
    """Its process has exited."""
    ended: bool = False
    """Dead, and read to its end; the file goes when all sinks have settled."""

    @property
    def place(self) -> Cursor:
        """How far it is read."""
        reader = self.reader
        return Cursor(reader.next_seq, reader.chains_from, reader.overwritten, reader.lost)


class Drain:
    """Reads whatever the spool's processes write; one thread calls, any thread asks for counters.

    *give_way* is called between two batches: an embedded agent lets the server run there. No batch
    is read where *has_room* says no. *note* is called with how far a file is read, after its records were
    delivered; *recall* has again what was read shortly before the place of a cursor.
    """

    def __init__(
        self,
        spool: Path,
        cursors: Cursors,
        *,
        batch: int = FULL_BATCH,
        give_way: Callable[[], None] = lambda: None,
        has_room: Callable[[], bool] = lambda: True,
        note: Note = lambda ring_id, place: None,
        recall: Deliver = lambda records: None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._spool = spool
        self._cursors = cursors
        self._batch = batch
        self._give_way = give_way
        self._has_room = has_room
        self._note = note
        self._recall = recall
        self.held = False
        """The last `poll` left records where they are: a sink had no room."""
        self._clock = clock
        self._rings: dict[Path, Ring] = {}
        self._broken: dict[Path, str] = {}
        self._lock = threading.Lock()
        """Held where readers come and go, and where their counters are read."""
        self._serving: dict[str, int] = {}
        of_writers = (*fmt.COUNTERS, "overwritten", "lost", "damaged")
        self._gone: dict[str, int] = dict.fromkeys(of_writers, 0)
        self._waited: dict[str, dict[str, int]] = {}
        """By service: what its processes that have exited had waited for."""
        own = ("records", "died", "rings_ended", "rings_broken")
        self._counts: dict[str, int] = dict.fromkeys(own, 0)

    @property
    def records(self) -> int:
        """Records delivered so far."""
        return self._counts["records"]

    def discover(self) -> None:
        """Open new files, and find out whose process has exited."""
        paths = ring_files(self._spool)
        for path in paths:
            if path not in self._rings:
                self._open(path)
        for path in self._broken.keys() - set(paths):
            del self._broken[path]
        for ring in self._rings.values():
            ring.dead = ring.dead or not ring.reader.writer_alive()

    def _open(self, path: Path) -> None:
        try:
            reader = RecorderReader(path, clock=self._clock)
            cursor = self._cursors.get(reader.process.ring_id)
            if cursor:
                reader.close()
                self._recall_before(path, cursor)
                reader = RecorderReader(
                    path,
                    next_seq=cursor.next_seq,
                    chains_from=cursor.chains_from,
                    clock=self._clock,
                )
                reader.overwritten, reader.lost = cursor.overwritten, cursor.lost
        except FileNotFoundError:
            return
        except (RecorderFileError, OSError) as problem:
            self._set_aside(path, str(problem))
            return
        self._broken.pop(path, None)
        ring = Ring(path, reader, reader.process)
        with self._lock:
            self._rings[path] = ring
        _log.info("worker %d of %s found", ring.process.pid, ring.process.service)

    def _recall_before(self, path: Path, cursor: Cursor) -> None:
        """Read again what an earlier agent read last: a batch comes before its members."""
        first = max(0, cursor.next_seq - RECALLED_SLOTS)
        with RecorderReader(path, next_seq=first, clock=self._clock) as reader:
            while left := cursor.next_seq - reader.next_seq:
                if left < 0 or not (records := reader.poll(min(left, self._batch))):
                    break
                self._recall(records)

    def _set_aside(self, path: Path, problem: str) -> None:
        """Leave a file that cannot be read where it is; logged once, tried again at each look."""
        if path in self._broken:
            return
        self._broken[path] = problem
        self._counts["rings_broken"] += 1
        _log.warning("%s; it is left as it is, all others are read", problem)

    def poll(self, deliver: Deliver) -> bool:
        """Deliver what is new in every file; True where one had more than its turn."""
        more = self.held = False
        for ring in [ring for ring in self._rings.values() if not ring.ended]:
            try:
                more = self._poll_ring(ring, deliver) or more
            except RecorderFileError as problem:
                self._set_aside(ring.path, str(problem))
                self._close(ring)
        return more

    def _poll_ring(self, ring: Ring, deliver: Deliver) -> bool:
        for _ in range(0, TURN, self._batch):
            if not self._has_room():
                self.held = True
                return True
            before = ring.reader.next_seq
            records = ring.reader.poll(self._batch)
            if records:
                deliver(records)
                self._counts["records"] += len(records)
            if ring.reader.next_seq != before:
                self._note(ring.process.ring_id, ring.place)
            if len(records) < self._batch:
                if ring.dead:
                    self._end(ring, deliver)
                return False
            self._give_way()
        return True

    def _end(self, ring: Ring, deliver: Deliver) -> None:
        """Deliver what was in flight in a process that has exited, now that all else is read."""
        in_flight = ring.reader.in_flight(self._clock())
        if in_flight:
            deliver(in_flight)
        self._counts["records"] += len(in_flight)
        self._counts["died"] += len(in_flight)
        self._counts["rings_ended"] += 1
        ring.ended = True
        _log.info("worker %d of %s has exited, %d requests in flight",
                  ring.process.pid, ring.process.service, len(in_flight))  # fmt: skip

    def places(self) -> Cursors:
        """Return how far each file is read."""
        return {ring.process.ring_id: ring.place for ring in self._rings.values()}

    def ended(self) -> list[Path]:
        """Return the files that are read to their end."""
        return [ring.path for ring in self._rings.values() if ring.ended]

    def remove(self, paths: Sequence[Path]) -> None:
        """Delete files that are read to their end; the caller knows that all is settled."""
        for path in paths:
            self._close(self._rings[path])
            path.unlink(missing_ok=True)
            probe_of(path).unlink(missing_ok=True)  # left by a process that was killed

    def _close(self, ring: Ring) -> None:
        with self._lock:
            for name, count in ring.reader.counters().items():
                self._gone[name] += count
            service = ring.process.service
            waits = (self._waited.get(service, {}), ring.reader.waits())
            self._waited[service] = summed(waits, GROWING)
            del self._rings[ring.path]
            ring.reader.close()

    def leave_existing(self) -> int:
        """Close the files that are still there, where another agent may read them; give how many."""
        existing = [ring for ring in self._rings.values() if ring.reader.still_there()]
        for ring in existing:
            self._close(ring)
        return len(existing)

    def close(self) -> None:
        """Close all files; nothing is deleted."""
        for ring in list(self._rings.values()):
            self._close(ring)

    def counters(self) -> dict[str, int]:
        """Return what was read, and the sum of the writers' own counters, exited ones included."""
        with self._lock:
            sums = dict(self._gone)
            for ring in self._rings.values():
                for name, count in ring.reader.counters().items():
                    sums[name] += count
            return self._counts | sums

    def waits(self) -> dict[str, dict[str, int]]:
        """Return what the processes of each service waited for; a service keeps its sums."""
        with self._lock:
            at_hand: dict[str, list[dict[str, int]]] = {s: [w] for s, w in self._waited.items()}
            for ring in self._rings.values():
                at_hand.setdefault(ring.process.service, []).append(ring.reader.waits())
            return {service: summed(waits, fmt.WAITS) for service, waits in at_hand.items()}

    def alive(self) -> list[tuple[Path, Process]]:
        """Return the recorder files whose processes live, and these processes."""
        with self._lock:
            return [(r.path, r.reader.process) for r in self._rings.values() if not r.dead]

    def loop_ticks(self) -> list[tuple[Path, Process, int, int]]:
        """Return the same, how often its event loops' timers have run, and late by how much (ns)."""
        with self._lock:
            return [
                (r.path, r.process, r.reader.wait("loop_ticks"), r.reader.wait("loop_lag_ns"))
                for r in self._rings.values()
                if not r.dead
            ]

    def serving_since(self, path: Path) -> list[int]:
        """Return the starts (monotonic ns) of the requests that the writer of *path* serves now."""
        with self._lock:
            ring = self._rings.get(path)
            return ring.reader.serving_since() if ring else []

    def rings(self) -> int:
        """Return the number of open recorder files."""
        return len(self._rings)

    def in_flight(self) -> dict[str, int]:
        """Count the requests in flight now by service; a service keeps its zero."""
        with self._lock:
            for service in self._serving:
                self._serving[service] = 0
            for ring in self._rings.values():
                service = ring.process.service
                now = 0 if ring.dead else ring.reader.requests_in_flight()
                self._serving[service] = self._serving.get(service, 0) + now
            return dict(self._serving)

    def cost(self) -> InstrumentCost:
        """Return the mean of what the middleware measured of itself in the live processes."""
        with self._lock:
            costs = [ring.reader.process.cost for ring in self._rings.values()]
        known = [cost for cost in costs if cost.base_ns] or [InstrumentCost(0, 0)]
        return InstrumentCost(
            sum(cost.base_ns for cost in known) // len(known),
            sum(cost.stage_ns for cost in known) // len(known),
        )
