"""What the agent itself takes, as samples: so that a load run's folder says what watching cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from stagescope.agent.collectors import Metered
from stagescope.agent.sample_store import SampleStore
from stagescope.samples import Sample

COLLECTOR_CPU_TIME = "stagescope.collector.cpu_time"
OTHER = "other"
"""The agent's CPU time that no collector used: reading records, exporting, answering."""
PERIOD_S = 1.0
COUNTERS_OF = "collector_"
"""What the names of a collector's counters begin with."""


def costs_of(collectors: Iterable[Metered]) -> dict[str, dict[str, float]]:
    """Give the counters of each by its name: `calls`, `cpu_s`, `late_s`, `longest_s`."""
    return {
        one.name: {
            counter.removeprefix(f"{COUNTERS_OF}{one.name}_"): value
            for counter, value in one.counters().items()
        }
        for one in collectors
    }


class OwnCost:
    """A collector that turns the CPU time of all collectors into samples.

    *cpu_s* gives the seconds used since the agent's start, by collector, and under `OTHER` the rest.
    """

    name = "own_cost"
    period_s = PERIOD_S

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
