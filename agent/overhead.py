"""The governor: what the samplers cost, as samples, and less of them where they cost too much."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from stagescope import settings
from stagescope.agent.collectors import Cost, Metered
from stagescope.agent.store.samples import SampleStore
from stagescope.samples import Sample

SHEDS: Final = ("capture", "micro-capture", "stack-rate", "stacks", "gpm")
"""What goes, in this order: level 1 is without the first, level 2 without the first two. `stack-rate`
halves the rate of stacks, `stacks` ends them."""

WINDOW_S: Final = 30.0
"""CPU is judged over this long, all of it after the last step: so no step is judged by what was
used before it, and no two steps are closer."""
RECOVER_S: Final = 120.0
"""How long it must be calm before a step is taken back."""
MOST_PATIENCE_S: Final = 3600.0
"""A step that is taken back and needed again is next taken back after twice as long, to this."""
CALM: Final = 0.7
"""Below this share of the budget it is calm; between it and the budget nothing changes."""


@dataclass(frozen=True, slots=True)
class LimiterState:
    """The governor's state."""

    level: int = 0
    """How many of `SHEDS` are shed."""
    since_ns: int = 0
    """When the last step was taken, or watching began."""
    calm_since_ns: int | None = None
    patience_s: float = RECOVER_S
    tried: bool = False
    """True where the last step took one back."""


def judge(state: LimiterState, share: float | None, now_ns: int, budget: float) -> LimiterState:
    """Return the next state: the same, or one step further or back.

    *share* is the CPU used, as a share of one core; None where too little is known yet.
    """
    if share is None:
        return state
    if share > budget:
        return _further(state, now_ns)
    if share > CALM * budget:
        return replace(state, calm_since_ns=None)
    if state.calm_since_ns is None:
        return replace(state, calm_since_ns=now_ns)
    if state.level and now_ns - state.calm_since_ns >= state.patience_s * 1e9:
        return _back(state, now_ns)
    return state


def _further(state: LimiterState, now_ns: int) -> LimiterState:
    if state.level == len(SHEDS):
        return replace(state, calm_since_ns=None)
    patience_s = state.patience_s
    if state.tried:  # what was taken back was needed after all
        patience_s = min(2 * patience_s, MOST_PATIENCE_S)
    return LimiterState(state.level + 1, now_ns, None, patience_s)


def _back(state: LimiterState, now_ns: int) -> LimiterState:
    # Where the last one held as well, there is no more reason for patience.
    patience_s = RECOVER_S if state.tried else state.patience_s
    return LimiterState(state.level - 1, now_ns, None, patience_s, tried=True)


class Usage:
    """Readings of a sum of CPU seconds, and their share of one core over the last window."""

    def __init__(self) -> None:
        self._readings: deque[tuple[int, float]] = deque()

    def add(self, at_ns: int, cpu_s: float) -> None:
        """Note that until *at_ns* there were *cpu_s* in all."""
        self._readings.append((at_ns, cpu_s))
        while len(self._readings) > 1 and self._readings[1][0] <= at_ns - WINDOW_S * 1e9:
            self._readings.popleft()

    def share(self, since_ns: int) -> float | None:
        """Return the share of one core in the last window; None until one began after *since_ns*."""
        if not self._readings:
            return None
        (begun_ns, before_s), (now_ns, now_s) = self._readings[0], self._readings[-1]
        if begun_ns < since_ns or now_ns - begun_ns < WINDOW_S * 1e9:
            return None
        return (now_s - before_s) / ((now_ns - begun_ns) / 1e9)


BUDGET_VARIABLE: Final = settings.AGENT_BUDGET.name
DEFAULT_BUDGET: Final = 0.01
"""All samplers together, as a share of one core."""
GOVERNOR_PERIOD_S: Final = 5.0
STACKS: Final = "stacks"
"""The collector whose cost is reported but not judged while a load run is under way: who started
the run asked for its stacks."""
SPARED_AFTER_S: Final = 15.0
"""For so long after a run too: its last window of stacks ends, and its CPU time is known, after it."""
OF_STACKS: Final = ("stack-rate", STACKS)
"""Of `SHEDS` those that a load run is spared."""

_log = logging.getLogger("stagescope")


def budget(environment: Mapping[str, str] = os.environ) -> float:
    """Return the budget, a share of one core; infinite for `off`."""
    return settings.AGENT_BUDGET.number(environment)


class Governor:
    """Watches what the samplers cost; samplers ask it what they may. A collector itself.

    Any thread may ask `allowed` and `stack_rate_factor`.
    """

    name = "governor"
    period_s = GOVERNOR_PERIOD_S

    def __init__(
        self,
        samples: SampleStore,
        *,
        budget: float = DEFAULT_BUDGET,
        run_under_way: Callable[[], bool] = lambda: False,
        clock: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        self._samples = samples
        self._budget = budget
        self._run_under_way = run_under_way
        self._clock = clock
        self._watched: list[Metered] = []
        self._last: dict[str, Cost] = {}
        self._read_ns = clock()
        self._state = LimiterState(since_ns=self._read_ns)
        self._usage = Usage()
        self._judged_s = self._exempt_s = 0.0
        self._spared_until_ns = -1
        self._share = 0.0
        self._counts = {"governor_sheds": 0, "governor_recoveries": 0}

    def watch(self, collectors: Sequence[Metered]) -> None:
        """Judge these too."""
        self._watched += collectors

    def allowed(self, what: str) -> bool:
        """Return whether *what* may be done now: `capture`, `micro-capture`, `stacks`, `gpm`.

        Raises ValueError for what is not in `SHEDS`: a mistake of ours, not of the user's.
        """
        within = self._state.level <= SHEDS.index(what)
        return within or (what in OF_STACKS and self._run_under_way())

    def stack_rate_factor(self) -> float:
        """Return by what to multiply the rate of stacks: 1, 0.5, or 0 for none."""
        return 1.0 if self.allowed("stack-rate") else 0.5 if self.allowed(STACKS) else 0.0

    def collect(self) -> None:
        """Read what everything has cost since the last time, keep it, judge."""
        now_ns = self._clock()
        if self._run_under_way():
            self._spared_until_ns = now_ns + int(SPARED_AFTER_S * 1e9)
        exempt = now_ns <= self._spared_until_ns
        for collector in self._watched:
            cost = collector.cost()
            grown = cost - self._last.get(collector.name, Cost())
            self._last[collector.name] = cost
            self._keep(collector.name, grown, now_ns)
            if exempt and collector.name == STACKS:
                self._exempt_s += grown.cpu_s
            else:
                self._judged_s += grown.cpu_s
        self._read_ns = now_ns
        self._usage.add(now_ns, self._judged_s)
        self._judge(now_ns)

    def _keep(self, name: str, grown: Cost, now_ns: int) -> None:
        amounts = {"late_time": grown.late_s, "stall_time": grown.stall_s}  # CPU: OwnCost
        self._samples.add(
            [
                Sample(f"stagescope.collector.{what}", self._read_ns, now_ns, amount, detail=name)
                for what, amount in amounts.items()
            ]
        )

    def _judge(self, now_ns: int) -> None:
        before = self._state
        share = self._usage.share(before.since_ns)
        if share is not None:
            self._share = share
        self._state = judge(before, share, now_ns, self._budget)
        if self._state.level > before.level:
            self._counts["governor_sheds"] += 1
            _log.warning(
                "samplers used %.2f %% of one core over %d s, their budget is %.2f %%: %s",
                100 * self._share, WINDOW_S, 100 * self._budget, _SHED[before.level],
            )  # fmt: skip
        elif self._state.level < before.level:
            self._counts["governor_recoveries"] += 1
            _log.info("samplers are within their budget again: no longer %s",
                      _SHED[self._state.level])  # fmt: skip

    def close(self) -> None:
        """Nothing was begun."""

    def counters(self) -> dict[str, float]:
        """Return steps taken, and CPU seconds judged, and not judged for a load run's sake."""
        return {
            **self._counts,
            "governor_judged_cpu_s": self._judged_s,
            "governor_exempt_cpu_s": self._exempt_s,
        }

    def gauges(self) -> dict[str, float]:
        """Return the level (0: nothing is shed), the share of one core used, and the budget."""
        known = {"governor_level": self._state.level, "governor_share": self._share}
        if self._budget < float("inf"):
            known["governor_budget"] = self._budget
        return known


_SHED: Final = (
    "no capture on a trigger",
    "no micro-captures",
    "stacks at half their rate",
    "no stacks outside load runs",
    "no GPM counters",
)
"""What each step means, for the log."""


COLLECTOR_CPU_TIME = "stagescope.collector.cpu_time"
OTHER = "other"
"""The agent's CPU time that no collector used: reading records, exporting, answering."""
COST_PERIOD_S = 1.0


class OwnCost:
    """A collector that turns the CPU time of all collectors into samples.

    *cpu_s* gives the seconds used since the agent's start, by collector, and under `OTHER` the rest.
    """

    name = "own_cost"
    period_s = COST_PERIOD_S

    def __init__(
        self,
        samples: SampleStore,
        cpu_s: Callable[[], Mapping[str, float]],
        clock: Callable[[], int],
    ) -> None:
        self._samples = samples
        self._cpu_s = cpu_s
        self._clock = clock
        self._last_ns = clock()
        self._last: dict[str, float] = {}

    def collect(self) -> None:
        """Add what each has used since the last call."""
        start_ns, end_ns = self._last_ns, self._clock()
        self._last_ns = end_ns
        grown: list[Sample] = []
        for name, used_s in self._cpu_s().items():
            last_s = self._last.get(name, 0.0)
            # The rest is a difference of two clocks: it may seem to shrink, and must not.
            self._last[name] = max(last_s, used_s)
            grown.append(
                Sample(COLLECTOR_CPU_TIME, start_ns, end_ns, self._last[name] - last_s, detail=name)
            )
        self._samples.add(grown)

    def close(self) -> None:
        """Nothing was begun."""
