"""The sampler `torch`: once a second, device time by stage and torch's memory, of each process.

The processes do the reading (`middleware/hooks/torch_readings.py`), each in its own thread; the
agent asks in one call and fetches the answers in the next, so its loop waits for none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stagescope.agent.collectors import Collector
from stagescope.agent.probe_client import probe_of
from stagescope.agent.probe_question import Question
from stagescope.agent.torch_samples import samples_between

if TYPE_CHECKING:
    from stagescope.agent.loop import Agent

PERIOD_S = 1.0
ANSWER_S = 0.25
"""From asking to fetching: the longest pause of the agent's loop."""
IDLE_ROUNDS = 10
"""A process that has no device to use, or no answer, is asked every tenth time only."""
PATIENCE = 5
"""Rounds that a busy process may take to answer."""
NONE = "none"


def make(agent: Agent) -> Sequence[Collector]:
    """Make the one collector; where no process has a device it asks little and adds nothing."""
    return [TorchSampler(agent)]


@dataclass(slots=True)
class _Asked:
    """A process, and what it said last."""

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
    """Asks every living process of the agent's spool."""

    name = "torch"

    def __init__(self, agent: Agent) -> None:
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
        # One recorder file of each process: each would tell the same.
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
        """Let go of the questions that are not answered."""
        for asked in self._asked.values():
            asked.drop()
        self._asked.clear()
