"""Runs every check at once, each within its time, and says what can be measured."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from stagescope.agent.doctor import gpu, host, outlets, serving
from stagescope.agent.doctor.environment import Environment
from stagescope.agent.doctor.finding import MEASURABLE, NO, WARN, Finding
from stagescope.agent.doctor.ptrace import ptrace
from stagescope.agent.doctor.py_spy import py_spy

DEADLINE_S: Final = 2.8
SCHEMA: Final = 1

Look = Callable[[Environment], Finding | None]


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the screen, and how to find out."""

    name: str
    group: str
    look: Look


CHECKS: Final = (
    Check("python", "requests and their stages", serving.python),
    Check("spool", "requests and their stages", serving.spool),
    Check("agent", "requests and their stages", serving.agent),
    Check("servers", "requests and their stages", serving.servers),
    Check("processes", "host and processes", host.processes),
    Check("cpus", "host and processes", host.cpus),
    Check("cgroup", "host and processes", host.cgroup),
    Check("pressure", "host and processes", host.pressure),
    Check("clock", "host and processes", host.clock),
    Check("py-spy", "Python stacks", py_spy),
    Check("ptrace", "Python stacks", ptrace),
    Check("nvidia", "GPU and kernels", gpu.nvml),
    Check("counters", "GPU and kernels", gpu.counters),
    Check("cupti", "GPU and kernels", gpu.cupti),
    Check("torch", "GPU and kernels", gpu.torch),
    Check("metrics", "where it goes, what it costs", outlets.metrics_port),
    Check("otlp", "where it goes, what it costs", outlets.otlp),
    Check("load", "where it goes, what it costs", outlets.load),
    Check("own cost", "where it goes, what it costs", outlets.own_cost),
    Check("settings", "where it goes, what it costs", outlets.configuration),
)


@dataclass(frozen=True, slots=True)
class Line:
    """A check's name, what it found, and how long that took."""

    name: str
    group: str
    finding: Finding
    took_s: float


@dataclass(frozen=True, slots=True)
class Examination:
    """All that was found."""

    around: Environment
    lines: tuple[Line, ...]

    def possible(self, what: str) -> bool:
        """Return whether *what*, one of `MEASURABLE`, can be measured here."""
        given = any(what in line.finding.gives for line in self.lines)
        return given and not any(what in line.finding.forbids for line in self.lines)

    def because(self, what: str) -> list[str]:
        """Return the names of the checks by which *what* is not possible, or only in part."""
        return [
            line.name for line in self.lines if what in (*line.finding.lacks, *line.finding.forbids)
        ]

    def to_json(self) -> dict[str, Any]:
        """Return it for machines; docs/doctor.md names the keys, which stay."""
        return {
            "schema": SCHEMA,
            "spool": str(self.around.spool),
            "pid": self.around.pid or None,
            "measurable": {
                what: {"possible": self.possible(what), "lacking": self.because(what)}
                for what in MEASURABLE
            },
            "checks": [_line_json(line) for line in self.lines],
        }


def _line_json(line: Line) -> dict[str, Any]:
    found = line.finding
    return {
        "name": line.name,
        "group": line.group,
        "status": found.status,
        "told": found.told,
        "do": list(found.do),
        "gives": list(found.gives),
        "lacks": list(found.lacks),
        "forbids": list(found.forbids),
        "facts": dict(found.facts),
        "took_s": round(line.took_s, 3),
    }


def examine(
    around: Environment, checks: Sequence[Check] = CHECKS, deadline_s: float = DEADLINE_S
) -> Examination:
    """Look at everything, each check on a thread: one that hangs is reported and abandoned."""
    found: queue.SimpleQueue[tuple[Check, Finding | None, float]] = queue.SimpleQueue()
    begun_s = time.monotonic()
    for check in checks:
        # Daemons: a driver that never answers must not keep this process.
        args = (check, around, found)
        threading.Thread(target=_look, args=args, name=check.name, daemon=True).start()
    lines: dict[str, Line] = {}
    seen: set[str] = set()
    while len(seen) < len(checks):
        left_s = begun_s + deadline_s - time.monotonic()
        try:
            check, finding, took_s = found.get(timeout=max(left_s, 0.001))
        except queue.Empty:
            break
        seen.add(check.name)
        if finding:
            lines[check.name] = Line(check.name, check.group, finding, took_s)
    for check in checks:
        if check.name not in seen:
            lines[check.name] = Line(check.name, check.group, _hangs(deadline_s), deadline_s)
    return Examination(around, tuple(lines[one.name] for one in checks if one.name in lines))


def _look(
    check: Check,
    around: Environment,
    found: queue.SimpleQueue[tuple[Check, Finding | None, float]],
) -> None:
    begun_s = time.monotonic()
    try:
        finding = check.look(around)
    except Exception as fault:  # noqa: BLE001 - the seam: a check's fault is its own line
        text = f"this check failed, a fault of stagescope's: {type(fault).__name__}: {fault}"
        finding = Finding(NO, text, ("report it, with this line",))
    found.put((check, finding, time.monotonic() - begun_s))


def _hangs(deadline_s: float) -> Finding:
    return Finding(WARN, f"did not finish within {deadline_s:g} s", ("run it again",))
