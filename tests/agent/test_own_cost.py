"""The agent's own cost becomes samples."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.collectors import PeriodicTask
from stagescope.agent.loop import Agent
from stagescope.agent.overhead import COLLECTOR_CPU_TIME, OTHER, OwnCost
from stagescope.agent.store.samples import SampleStore
from stagescope.testing.clock import HandClock
from stagescope.testing.spool import short_spool


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


def test_samples_hold_what_was_used_since_the_last() -> None:
    """Each stretch begins where the one before ended, and what seems to shrink counts nothing."""
    now_ns, used = 5, {"host": 0.5, OTHER: 1.0}
    store = SampleStore()
    cost = OwnCost(store, lambda: used, lambda: now_ns)
    now_ns = 7
    cost.collect()
    now_ns, used = 9, {"host": 0.75, OTHER: 0.9}
    cost.collect()
    now_ns, used = 11, {"host": 0.75, OTHER: 1.5}
    cost.collect()

    found = [(s.detail, s.start_ns, s.end_ns, s.value) for s in store.between(0, 100)]
    assert sorted(found) == [
        ("host", 5, 7, 0.5), ("host", 7, 9, 0.25), ("host", 9, 11, 0.0),
        (OTHER, 5, 7, 1.0), (OTHER, 7, 9, 0.0), (OTHER, 9, 11, 0.5),
    ]  # fmt: skip


def test_every_collector_of_an_agent_has_a_series(spool: Path) -> None:
    """All of them, by name, sum to the CPU time that the agent has used since it was made."""
    clock = HandClock()
    used_s = 100.0  # what the process had used before

    def spend() -> None:
        sum(range(200_000))

    agent = Agent(
        spool,
        {},
        samplers=lambda _: [PeriodicTask("busy", 0.5, spend)],
        clock=clock,
        cpu_s=lambda: used_s,
    )
    for _ in range(4):
        used_s += 10.0
        agent.step()
        clock.tick(500_000_000)
    agent.close()
    samples = [
        s for s in agent.evidence.samples.between(0, clock()) if s.name == COLLECTOR_CPU_TIME
    ]
    total = dict.fromkeys({s.detail for s in samples}, 0.0)
    for one in samples:
        total[one.detail] += one.value

    assert {"busy", "discover", "governor", "tidy", "checkpoint", "own_cost", OTHER} == set(total)
    assert total["busy"] > 0
    assert sum(total.values()) == pytest.approx(30.0, rel=0.01)  # the last was asked in step 3
