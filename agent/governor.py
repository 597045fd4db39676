"""The governor: what the samplers cost, as samples, and less of them where they cost too much."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final

from stagescope.agent.collectors import Cost, Metered
from stagescope.agent.sample_store import SampleStore
from stagescope.agent.shedding import SHEDS, WINDOW_S, Standing, Usage, judge
from stagescope.errors import UsageError
from stagescope.samples import Sample

BUDGET_VARIABLE: Final = "STAGESCOPE_AGENT_BUDGET"
DEFAULT_BUDGET: Final = 0.01
"""All samplers together, as a share of one core."""
PERIOD_S: Final = 5.0
STACKS: Final = "stacks"
"""The collector whose cost is reported but not judged while a load run is under way: who started
the run asked for its stacks."""
SPARED_AFTER_S: Final = 15.0
"""For so long after a run too: its last window of stacks ends, and tells its CPU, after it."""
OF_STACKS: Final = ("stack-rate", STACKS)
"""Of `SHEDS` those that a load run is spared."""

_log = logging.getLogger("stagescope")


def budget(environment: Mapping[str, str] = os.environ) -> float:
    """Give the budget, a share of one core; infinite for `off`. Raises UsageError."""
    text = environment.get(BUDGET_VARIABLE, "").strip()
    if text == "off":
        return float("inf")
    try:
        share = float(text or DEFAULT_BUDGET)
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise UsageError(
            f"{BUDGET_VARIABLE}={text}: give a share of one core, for example 0.01, or `off`"
        )
    return share


class Governor:
    """Watches what the samplers cost; samplers ask it what they may. A collector itself.

    Any thread may ask `allowed` and `stack_rate_factor`.
    """

    name = "governor"
    period_s = PERIOD_S

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
        self._standing = Standing(since_ns=self._read_ns)
        self._usage = Usage()
        self._judged_s = self._exempt_s = 0.0
        self._spared_until_ns = -1
        self._share = 0.0
        self._counts = {"governor_sheds": 0, "governor_recoveries": 0}

    def watch(self, collectors: Sequence[Metered]) -> None:
        """Judge these too."""
        self._watched += collectors

    def allowed(self, what: str) -> bool:
        """Tell whether *what* may be done now: `capture`, `micro-capture`, `stacks`, `gpm`.

        Raises ValueError for what is not in `SHEDS`: a mistake of ours, not of the user's.
        """
        within = self._standing.level <= SHEDS.index(what)
        return within or (what in OF_STACKS and self._run_under_way())

    def stack_rate_factor(self) -> float:
        """Give by what to multiply the rate of stacks: 1, 0.5, or 0 for none."""
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
        amounts = {"late_time": grown.late_s, "stall_time": grown.stall_s}  # CPU: own_cost.py
        self._samples.add(
            [
                Sample(f"stagescope.collector.{what}", self._read_ns, now_ns, amount, detail=name)
                for what, amount in amounts.items()
            ]
        )

    def _judge(self, now_ns: int) -> None:
        before = self._standing
        share = self._usage.share(before.since_ns)
        if share is not None:
            self._share = share
        self._standing = judge(before, share, now_ns, self._budget)
        if self._standing.level > before.level:
            self._counts["governor_sheds"] += 1
            _log.warning(
                "samplers used %.2f %% of one core over %d s, their budget is %.2f %%: %s",
                100 * self._share, WINDOW_S, 100 * self._budget, _SHED[before.level],
            )  # fmt: skip
        elif self._standing.level < before.level:
            self._counts["governor_recoveries"] += 1
            _log.info("samplers are within their budget again: no longer %s",
                      _SHED[self._standing.level])  # fmt: skip

    def close(self) -> None:
        """Nothing was begun."""

    def counters(self) -> dict[str, float]:
        """Give steps taken, and CPU seconds judged, and not judged for a load run's sake."""
        return {
            **self._counts,
            "governor_judged_cpu_s": self._judged_s,
            "governor_exempt_cpu_s": self._exempt_s,
        }

    def gauges(self) -> dict[str, float]:
        """Give the level (0: nothing is shed), the share of one core used, and the budget."""
        known = {"governor_level": self._standing.level, "governor_share": self._share}
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
