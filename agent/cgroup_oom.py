"""Notices that the kernel killed for want of memory in the control group of a served process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from stagescope.agent.notices import OOM, Notice, Notices
from stagescope.records import Process

EVERY_S: Final = 5.0
COUNTED: Final = ("oom", "oom_kill")
"""Of `memory.events` (kernel, admin-guide/cgroup-v2): the limit was reached and could not be
kept; a process was killed for it."""


class CgroupOom:
    """Compares `memory.events` of the control groups (v2) that served processes live in."""

    def __init__(
        self,
        notices: Notices,
        alive: Callable[[], Sequence[tuple[Path, Process]]],
        *,
        proc: Path = Path("/proc"),
        mount: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        self._notices = notices
        self._alive = alive
        self._proc = proc
        self._mount = mount
        self._counts: dict[Path, dict[str, int]] = {}
        self._due_ns = 0

    def look(self, now_ns: int) -> None:
        """Read each group once, every EVERY_S."""
        if now_ns < self._due_ns:
            return
        self._due_ns = now_ns + int(EVERY_S * 1e9)
        groups = {self._events_of(process.pid): process for _, process in self._alive()}
        counts = {path: found for path in groups if (found := _counts(path))}
        for path, found in counts.items():
            self._compare(path, found, groups[path], now_ns)
        self._counts = counts

    def _compare(self, path: Path, found: dict[str, int], process: Process, now_ns: int) -> None:
        before = self._counts.get(path)
        grown = {name: found[name] - before[name] for name in found} if before else {}
        if any(grown.values()):
            sentence = (
                f"the control group of {process.service} ran out of memory: {grown['oom']} times "
                f"at its limit, {grown['oom_kill']} processes killed ({path})"
            )
            self._notices.put(Notice(OOM, process.pid, "", now_ns, sentence))

    def _events_of(self, pid: int) -> Path:
        try:
            lines = (self._proc / str(pid) / "cgroup").read_text().splitlines()
        except OSError:
            lines = []
        group = next((line[3:] for line in lines if line.startswith("0::")), "/")
        return self._mount / group.lstrip("/") / "memory.events"


def _counts(path: Path) -> dict[str, int]:
    """Give the counts; empty where there are none, as in the root group or under version 1."""
    try:
        pairs = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    found = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2}
    return {name: found.get(name, 0) for name in COUNTED}
