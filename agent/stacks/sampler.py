"""The sampler `stacks`: windows of Python stacks, by py-spy or by the served process itself.

`STAGESCOPE_STACKS`: `runs` (the default) samples while a load run is under way, `always` one
second in each thirty, `off` never. Two processes at a time, all in turn.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from stagescope import settings
from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.agent.log_once import LogOnce
from stagescope.agent.stacks.in_process import InProcess, StackSampler, Target, Window
from stagescope.agent.stacks.labels import RawStack, StageLabels, with_intervals
from stagescope.agent.stacks.permissions import why_not
from stagescope.agent.stacks.py_spy import PySpy, find_py_spy
from stagescope.errors import StagescopeError
from stagescope.records import Process
from stagescope.stacks import StackSpan

WINDOW_S = 5.0
ALWAYS_WINDOW_S = 1.0
ALWAYS_EVERY_S = 30.0
AT_ONCE = 2
REST_S = 5.0
"""How long a process whose window failed is left alone."""
FOLDER = "stacks"

_log = logging.getLogger("stagescope")


def make(agent: AgentContext, environment: Mapping[str, str] = os.environ) -> Sequence[Collector]:
    """Make the collector; none where `STAGESCOPE_STACKS=off`."""
    mode = settings.STACKS.choice(environment)
    if mode == "off":
        return ()
    agent.actions.stacks = made = Stacks(agent, always=mode == "always")
    return (made,)


class Choice:
    """Chooses who samples a process: py-spy where it may, else the process itself; says why."""

    def __init__(self, agent: AgentContext) -> None:
        self._folder = agent.spool / FOLDER
        self._own = InProcess()
        self._spy = None if agent.shared else self._find()
        self._say = LogOnce()
        self._readable: set[Path] = set()
        self._unfit: set[Path] = set()
        """Processes with which py-spy has failed."""

    def _find(self) -> PySpy | None:
        py_spy = find_py_spy()
        if py_spy is None:
            _log.warning("py-spy is not installed, so processes sample their own stacks, which "
                         "costs them more: pip install py-spy")  # fmt: skip
            return None
        # What an agent that was killed has left; nobody else works in this spool.
        shutil.rmtree(self._folder, ignore_errors=True)
        try:
            self._folder.mkdir(mode=0o700)
        except OSError as problem:
            _log.warning("processes sample their own stacks, because py-spy has nowhere to write: "
                         "%s: %s", self._folder, problem.strerror)  # fmt: skip
            return None
        return PySpy(py_spy, self._folder)

    def of(self, target: Target) -> StackSampler:
        """Return the sampler for *target*."""
        if self._spy is None or target.ring in self._unfit:
            return self._own
        if target.ring not in self._readable:
            if why := why_not(target):
                self._say(f"process {target.pid} samples its stacks by itself: {why}")
                return self._own
            self._readable.add(target.ring)
        return self._spy

    def give_up(self, target: Target, problem: StagescopeError) -> None:
        """Make *target* sample itself from now on, if py-spy failed with it."""
        if target.ring in self._readable and target.ring not in self._unfit:
            self._unfit.add(target.ring)
            self._say(f"{problem}; if it lives, it samples its stacks by itself from now on")
        else:
            self._say(str(problem))

    def close(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self._folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class _Going:
    """A window that is not over."""

    window: Window
    sampler: StackSampler
    reason: str
    """`StackSpan.reason`."""


class Stacks:
    """The collector: begins windows, polls them, labels what they saw."""

    name = "stacks"
    period_s = 0.2

    def __init__(
        self,
        agent: AgentContext,
        *,
        always: bool,
        window_s: float | None = None,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._agent = agent
        self._always = always
        self._window_s = window_s or (ALWAYS_WINDOW_S if always else WINDOW_S)
        self._clock = clock
        self._choice: Choice | None = None
        self._labels = StageLabels()
        self._windows: list[_Going] = []
        self._not_before_ns: dict[Path, int] = {}
        """By process: when its next window may begin."""
        self._turns: dict[Path, int] = {}
        """By process: how many windows it has had."""
        self._spent_s = 0.0
        """CPU seconds of the windows that are over."""
        self._finishing = False
        self._idle = threading.Condition()
        agent.evidence.before_reading.append(self.finish)

    def collect(self) -> None:
        """Collect the windows that are over, begin those that are due."""
        for going in list(self._windows):
            self._poll(going)
        if not self._finishing and (self._always or self._agent.run_under_way()):
            self._begin_some()
        with self._idle:
            if not self._windows:
                self._finishing = False
                self._idle.notify_all()

    def _poll(self, going: _Going) -> None:
        window = going.window
        if self._finishing:
            window.finish()
        try:
            raws = window.poll()
        except StagescopeError as problem:
            self._over(going)
            self._failed(window.target, problem)
            return
        if raws is None:
            return
        self._over(going)
        spans = self._labelled(window.target, raws, going)
        self._agent.evidence.stacks.add(
            [span for span in spans if span.stage or span.running or span.cpu_ns]
        )
        self._agent.evidence.count("stacks_windows")

    def _over(self, going: _Going) -> None:
        self._windows.remove(going)
        self._spent_s += going.window.cpu_s

    def children_cpu_s(self) -> float:
        """Return the CPU seconds of py-spy (`collectors.Employer`)."""
        return self._spent_s + sum(going.window.cpu_s for going in self._windows)

    def window(self, ring: Path, process: Process, reason: str, seconds: float) -> bool:
        """Begin one for a trigger (`actions.StackAction`); False where the process has one already."""
        if any(going.window.target.ring == ring for going in self._windows):
            return False
        return self._begin(Target(ring, process), seconds, reason)

    def _failed(self, target: Target, problem: StagescopeError) -> None:
        self._agent.evidence.count("stacks_failed")
        self._leave_alone(target, REST_S)
        self._chosen().give_up(target, problem)

    def _labelled(self, target: Target, raws: Sequence[RawStack], going: _Going) -> list[StackSpan]:
        sampler = going.sampler
        spans = self._labels.label(
            target.pid, raws, going.reason, sampler.how, going.window.thread_cpu
        )
        since_ns = min((span.start_ns for span in spans), default=0) - sampler.error_ns
        recent = self._agent.recent
        return with_intervals(
            spans,
            recent.of(target.process.ring_id, since_ns),
            self._agent.serving_since(target.ring),
            recent.whole_since_ns,
            sampler.error_ns,
        )

    def _chosen(self) -> Choice:
        if self._choice is None:  # Not before the first window: many agents never have one.
            self._choice = Choice(self._agent)
        return self._choice

    def _begin_some(self) -> None:
        now_ns = self._clock()
        busy = {going.window.target.ring for going in self._windows}
        due = [
            Target(ring, process)
            for ring, process in self._agent.alive()
            if ring not in busy and self._not_before_ns.get(ring, 0) <= now_ns
        ]
        due.sort(key=lambda target: self._turns.get(target.ring, 0))
        for target in due[: max(0, AT_ONCE - len(self._windows))]:
            self._take_turn(target)

    def _take_turn(self, target: Target) -> None:
        newest = {ring for ring, _ in self._agent.alive()}
        self._turns = {ring: n for ring, n in self._turns.items() if ring in newest}
        self._turns[target.ring] = self._turns.get(target.ring, 0) + 1
        if self._always:
            self._leave_alone(target, ALWAYS_EVERY_S)
        self._begin(target, self._window_s, "window")

    def _begin(self, target: Target, seconds: float, reason: str) -> bool:
        pace = self._agent.permissions.stack_rate_factor()
        if not pace:
            return False
        sampler = self._chosen().of(target)
        try:
            window = sampler.begin(target, seconds, pace)
        except StagescopeError as problem:
            self._failed(target, problem)
            return False
        self._windows.append(_Going(window, sampler, reason))
        return True

    def _leave_alone(self, target: Target, seconds: float) -> None:
        now_ns = self._clock()
        self._not_before_ns = {r: ns for r, ns in self._not_before_ns.items() if ns > now_ns}
        self._not_before_ns[target.ring] = now_ns + int(seconds * 1e9)

    def finish(self, timeout_s: float) -> None:
        """End the windows now, and wait until what they saw is stored; from any thread."""
        with self._idle:
            if self._windows:
                self._finishing = True
                self._idle.wait_for(lambda: not self._windows, timeout_s)

    def close(self) -> None:
        """End all windows; what they saw is given up."""
        for going in self._windows:
            going.window.close()
        self._windows.clear()
        if self._choice is not None:
            self._choice.close()
