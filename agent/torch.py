"""The sampler `torch`: once a second, device time by stage and torch's memory, of each process.

The processes do the reading (`middleware/torch/memory.py`), each in its own thread; the
agent asks in one call and fetches the answers in the next, so its loop waits for none of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.agent.probe import Question, probe_of
from stagescope.samples import Sample

DEVICE_TIME = "model_server.stage.device_time"
DEVICE_TIMED = "model_server.stage.device_timed"
DEVICE_OPENED = "model_server.stage.device_opened"
DEVICE_MISSED = "model_server.stage.device_missed"
MEMORY = "model_server.torch.memory"
PINNED = "model_server.torch.pinned"
NANO, MICRO = 1e-9, 1e-6

Counts = dict[tuple[str, str, str], float]
"""What only grows, by name, device and detail."""


def samples_between(
    before: Mapping[str, Any] | None, now: Mapping[str, Any], pid: int
) -> list[Sample]:
    """Return the levels of *now*, and the growth since *before*; without a *before*, levels alone."""
    at_ns = int(now["at_ns"])
    levels = [
        Sample(name, at_ns, at_ns, value, pid, device, detail)
        for (name, device, detail), value in _levels(now)
    ]
    if before is None:
        return levels
    since_ns, counted = int(before["at_ns"]), counts(before)
    grown = [
        Sample(*key[:1], since_ns, at_ns, value - counted.get(key, 0.0), pid, *key[1:])
        for key, value in counts(now).items()
    ]
    # A count that fell was reset: the process stopped and restarted taking device times.
    return levels + [sample for sample in grown if sample.value > 0]


def counts(answer: Mapping[str, Any]) -> Counts:
    """Return what only grows in the life of a process."""
    found: Counts = {}
    for key, value in (*_times(answer.get("times") or {}), *_events(answer)):
        found[key] = found.get(key, 0.0) + value
    return found


Reading = tuple[tuple[str, str, str], float]


def _times(times: Mapping[str, Any]) -> Iterator[Reading]:
    for one in times.get("stages", ()):
        device, stage = one["device"], one["stage"]
        yield (DEVICE_TIME, device, stage), one["ns"] * NANO
        yield (DEVICE_TIMED, device, stage), one["timed"]
        yield (DEVICE_OPENED, "", stage), one["opened"]
    for stage, count in times.get("untold", {}).items():
        yield (DEVICE_OPENED, "", stage), count
    for reason, count in times.get("missed", {}).items():
        yield (DEVICE_MISSED, "", reason), count


def _events(answer: Mapping[str, Any]) -> Iterator[Reading]:
    for memory in answer.get("memory", ()):
        for name, count in memory["events"].items():
            yield (f"{MEMORY}.events", memory["device"], name), count
    pinned = answer.get("pinned") or {}
    for name, count in pinned.get("events", {}).items():
        yield (f"{PINNED}.events", "", name), count
    for call, total_us in pinned.get("time_us", {}).items():
        yield (f"{PINNED}.driver_time", "", call), total_us * MICRO


def _levels(answer: Mapping[str, Any]) -> Iterator[Reading]:
    for memory in answer.get("memory", ()):
        device, held = memory["device"], memory["bytes"]
        for what, value in held.items():
            yield (f"{MEMORY}.{what}", device, ""), value
        for what, value in memory["peak_bytes"].items():
            yield (f"{MEMORY}.peak", device, what), value
        if held.get("reserved") and "inactive_split" in held:
            share = held["inactive_split"] / held["reserved"]
            yield (f"{MEMORY}.fragmentation", device, ""), share
        if held.get("requested"):  # A torch that does not count it says 0.
            yield (f"{MEMORY}.rounding", device, ""), held["allocated"] - held["requested"]
    pinned = answer.get("pinned") or {}
    for what, value in pinned.get("bytes", {}).items():
        yield (f"{PINNED}.{what}", "", ""), value
    for what, value in pinned.get("peak_bytes", {}).items():
        yield (f"{PINNED}.peak", "", what), value


PERIOD_S = 1.0
ANSWER_S = 0.25
"""From asking to fetching: the longest pause of the agent's loop."""
IDLE_ROUNDS = 10
"""A process that has no device to use, or no answer, is asked every tenth time only."""
PATIENCE = 5
"""Rounds that a busy process may take to answer."""
NONE = "none"


def make(agent: AgentContext) -> Sequence[Collector]:
    """Make the one collector; where no process has a device it asks little and adds nothing."""
    return [TorchSampler(agent)]


@dataclass(slots=True)
class _Asked:
    """A process, and its newest answer."""

    pid: int
    question: Question | None = None
    last: Mapping[str, Any] | None = None
    rest: int = 0
    """Rounds in which it is not asked."""
    late: int = 0
    """Rounds for which its answer has been awaited."""

    def drop(self) -> None:
        """Await no answer."""
        if self.question is not None:
            self.question.close()
        self.question, self.late = None, 0


class TorchSampler:
    """Asks every live process of the agent's spool."""

    name = "torch"

    def __init__(self, agent: AgentContext) -> None:
        self._agent = agent
        self._asked: dict[tuple[str, int], _Asked] = {}
        """By host and pid: containers may share a spool."""
        self._waiting = False

    @property
    def period_s(self) -> float:
        """Seconds to the next call; the loop asks before it calls."""
        return PERIOD_S - ANSWER_S if self._waiting else ANSWER_S

    def collect(self) -> None:
        """Ask all, or fetch what they answered."""
        if self._waiting:
            for asked in self._asked.values():
                self._fetch(asked)
        else:
            self._ask_all()
        self._waiting = not self._waiting

    def _ask_all(self) -> None:
        # One recorder file of each process: all would give the same answer.
        alive = {(process.host, process.pid): ring for ring, process in self._agent.alive()}
        for gone in self._asked.keys() - alive.keys():
            self._asked.pop(gone).drop()
        for key, ring in alive.items():
            asked = self._asked.setdefault(key, _Asked(key[1]))
            if asked.rest:
                asked.rest -= 1
            elif asked.question is None:
                asked.question = Question(probe_of(ring), "torch")

    def _fetch(self, asked: _Asked) -> None:
        if asked.question is None:
            return
        answer = asked.question.answer()
        asked.late += 1
        if answer is None and asked.late < PATIENCE:
            return
        asked.drop()
        if not answer or answer.get("state") == NONE:
            asked.rest = IDLE_ROUNDS - 1
        elif "memory" in answer:
            self._agent.evidence.samples.add(samples_between(asked.last, answer, asked.pid))
            asked.last = answer

    def close(self) -> None:
        """Close the questions that are not answered."""
        for asked in self._asked.values():
            asked.drop()
        self._asked.clear()
