"""Notices a slow tail: several requests of a route far beyond its running p99, in a short time.

A sink, so it sees every request: a dictionary and a bucket each, less than a microsecond.
"""

from __future__ import annotations

import json
import os
import stat
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from stagescope.agent.events import KINDS, OOM, SLOW, EventQueue, Notice
from stagescope.agent.host.cgroups import cgroup_of, find_mount
from stagescope.agent.host.proc import counts, read
from stagescope.agent.sinks import PromptSink
from stagescope.exporters.tail_sampling import SlowTail
from stagescope.records import Process, Record, RequestRecord, State

FACTOR: Final = 2.0
"""Slow is what takes this many times the p99 of its route..."""
FLOOR_NS: Final = 20_000_000
"""...and by this much longer: a doubled millisecond is no reason to look."""
AT_LEAST: Final = 3
WITHIN_S: Final = 10.0
MAX_ROUTES: Final = 256
"""Of a service's routes beyond these no tail is watched."""
OWN_STALL: Final = "capture"
"""Cause of the stalls that a capture of ours makes: no reason for another one."""

Key = tuple[str, str, str]
"""Service, method, route."""


class Route:
    """One route: its running p99, and the newest requests that went far beyond it."""

    __slots__ = ("slow", "tail")

    def __init__(self) -> None:
        self.tail = SlowTail()
        self.slow: deque[RequestRecord] = deque(maxlen=AT_LEAST)


class SlowWatch(PromptSink):
    """Puts a notice where at least AT_LEAST requests of a route were slow within WITHIN_S."""

    def __init__(
        self, notices: EventQueue, counts: Callable[[], dict[str, int]] = dict[str, int]
    ) -> None:
        """*counts*: what is shown as this sink's counters, the triggers' own."""
        self.newest: Process | None = None
        """Whose record came last."""
        self._notices = notices
        self._counts = counts
        self._routes: dict[Key, Route] = {}

    def accept(self, records: Sequence[Record]) -> None:
        """Check each request."""
        routes = self._routes
        for record in records:
            if type(record) is RequestRecord:
                key = record.process.service, record.method, record.route
                route = routes.get(key)
                if route is None:
                    if len(routes) >= MAX_ROUTES:
                        continue
                    route = routes[key] = Route()
                tail = route.tail
                if tail.add(record.duration_ns) and record.duration_ns > (
                    FACTOR * tail.limit_ns + FLOOR_NS
                ):
                    self._found(route, record)
        self.accepted += len(records)
        if records:
            self.newest = records[-1].process

    def _found(self, route: Route, record: RequestRecord) -> None:
        if record.state is State.DIED or any(one.cause == OWN_STALL for one in record.stalls):
            return
        slow = route.slow
        slow.append(record)
        if len(slow) == AT_LEAST and _end_ns(record) - _end_ns(slow[0]) <= WITHIN_S * 1e9:
            at_ns, pid = _end_ns(record), record.process.pid
            self._notices.put(Notice(SLOW, pid, "", at_ns, _slow_sentence(list(slow), route.tail)))
            slow.clear()

    def counters(self) -> dict[str, int]:
        """Return what the triggers made of it."""
        return self._counts()


def _end_ns(record: RequestRecord) -> int:
    return record.start_ns + record.duration_ns


def _slow_sentence(slow: list[RequestRecord], tail: SlowTail) -> str:
    worst = max(slow, key=lambda record: record.duration_ns)
    spent = worst.self_ns()
    stage = max(spent, key=lambda name: spent[name])
    return (
        f"{len(slow)} requests of {worst.method} {worst.route or worst.path} took more than "
        f"{FACTOR:g} times its p99 ({tail.limit_ns / 1e6:.3g} ms) within {WITHIN_S:g} s; the "
        f"slowest took {worst.duration_ns / 1e6:.4g} ms, {spent[stage] / 1e6:.4g} of them in "
        f"{stage} (trace {worst.trace_id})"
    )


EVERY_S: Final = 5.0
COUNTED: Final = ("oom", "oom_kill")
"""Of `memory.events` (kernel, admin-guide/cgroup-v2): the limit was reached and could not be
kept; a process was killed for it."""


class CgroupOom:
    """Compares `memory.events` of the control groups (v2) that served processes live in."""

    def __init__(
        self,
        notices: EventQueue,
        alive: Callable[[], Sequence[tuple[Path, Process]]],
        root: str = "",
    ) -> None:
        """*root* is the folder of `/proc` and `/sys`."""
        self._notices = notices
        self._alive = alive
        self._proc = f"{root}/proc"
        self._mount = find_mount(self._proc, root)
        self._counts: dict[str, dict[str, int]] = {}
        self._due_ns = 0

    def look(self, now_ns: int) -> None:
        """Read each group once, every EVERY_S."""
        if now_ns < self._due_ns:
            return
        self._due_ns = now_ns + int(EVERY_S * 1e9)
        groups = {self._events_of(process.pid): process for _, process in self._alive()}
        counts = {path: found for path in groups if path and (found := _counts(path))}
        for path, found in counts.items():
            self._compare(path, found, groups[path], now_ns)
        self._counts = counts

    def _compare(self, path: str, found: dict[str, int], process: Process, now_ns: int) -> None:
        before = self._counts.get(path)
        grown = {name: found[name] - before[name] for name in found} if before else {}
        if any(grown.values()):
            sentence = (
                f"the control group of {process.service} ran out of memory: {grown['oom']} times "
                f"at its limit, {grown['oom_kill']} processes killed ({path})"
            )
            self._notices.put(Notice(OOM, process.pid, "", now_ns, sentence))

    def _events_of(self, pid: int) -> str:
        """Return the file of a process's group; empty for the root group and under version 1."""
        group = cgroup_of(self._proc, pid) if self._mount else None
        folder = self._mount.place(group) if self._mount and group else None
        return f"{folder}/memory.events" if folder else ""


def _counts(path: str) -> dict[str, int]:
    """Return the counts; empty where there are none."""
    found = counts(read(path))
    return {name: found.get(name, 0) for name in COUNTED} if found else {}


# Takes the notices that served processes leave in the spool: `notices/*.json`, one object each.
#
# `{"kind": "oom", "pid": 4711, "at_ns": 123, "path": "/.../snapshot.pickle"}`; `sentence` may tell
# more, and `why_no_path` why there is no path. A writer gives a file its name when it is whole. A spool may be shared by several
# containers, so what lies there is read with care.


FOLDER: Final = "notices"
SUFFIX: Final = ".json"
BAD_SUFFIX: Final = ".bad"
MOST_AT_ONCE: Final = 32
MAX_BYTES: Final = 1 << 16


class NoticeFiles:
    """Reads and removes the notices of one spool; what is none is set aside as `*.bad`."""

    def __init__(self, notices: EventQueue, spool: Path) -> None:
        self.bad = 0
        self._notices = notices
        self._folder = spool / FOLDER

    def look(self, now_ns: int) -> None:
        """Read what is there, oldest first."""
        try:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(SUFFIX))
        except OSError:
            return  # nobody has left one yet
        for name in names[:MOST_AT_ONCE]:
            self._take(self._folder / name)

    def _take(self, path: Path) -> None:
        try:
            self._notices.put(_read(path))
            path.unlink(missing_ok=True)
        except FileNotFoundError:
            return
        except (OSError, ValueError, KeyError, TypeError):
            self.bad += 1
            with suppress(OSError):
                path.rename(path.with_suffix(BAD_SUFFIX))


def _read(path: Path) -> Notice:
    """Read one; raises ValueError or OSError for what is no notice."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError("no file")
        said = json.loads(file.read(MAX_BYTES))
    if not isinstance(said, dict) or said.get("kind") not in KINDS:
        raise ValueError("no notice")
    pid, at_ns = int(said["pid"]), int(said["at_ns"])
    return Notice(str(said["kind"]), pid, str(said.get("device", "")), at_ns, _sentence(said))


def _sentence(said: dict[str, Any]) -> str:
    sentence = str(said.get("sentence") or f"process {said['pid']} reported {said['kind']}")
    if said.get("path"):
        return f"{sentence}; see {said['path']}"
    return f"{sentence}; {said['why_no_path']}" if said.get("why_no_path") else sentence
