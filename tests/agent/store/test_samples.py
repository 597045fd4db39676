"""The sample store: what comes back, what is bounded, what is forgotten."""

from __future__ import annotations

import os
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from stagescope.agent.loop import KEEP_S, Agent
from stagescope.agent.store.samples import BLOCK_SAMPLES, SampleStore
from stagescope.recorder.spool import OPEN_RUN_SUFFIX, RUNS_FOLDER
from stagescope.samples import Sample
from stagescope.testing.clock import HandClock
from stagescope.testing.spool import short_spool
from tests.support.evidence import sample

SERIES = 58
"""So many readings a second one server has."""


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


def reading(second: int, pid: int = 0) -> list[Sample]:
    """Return the readings of one second: levels that seldom move, and growths that do."""
    random = Random(second)
    start = 10**15 + second * 10**9 + random.randrange(10**6)
    return [
        sample(
            name=f"level-{number}" if number % 2 else f"growth-{number}",
            start_ns=start,
            end_ns=start + 10**9,
            value=4096.0 * (second // 10) if number % 2 else random.random(),
            pid=pid,
        )
        for number in range(SERIES)
    ]


def test_samples_come_back_exactly_however_many_are_packed() -> None:
    """In the order in which they came; those alone that overlap the time asked for."""
    store = SampleStore()
    added = [one for second in range(200) for one in reading(second)]
    for second in range(200):
        store.add(reading(second))

    assert len(added) > 2 * BLOCK_SAMPLES
    assert list(store.between(0, 2**62)) == added
    since, until = added[SERIES * 60].end_ns, added[SERIES * 140].start_ns
    assert list(store.between(since, until)) == [
        one for one in added if one.end_ns >= since and one.start_ns <= until
    ]
    assert store.gauges() == {"samples_held": len(added), "sample_series": SERIES}


def test_the_newest_and_the_total_outlive_what_is_dropped() -> None:
    """The oldest go first beyond the bound, and a series of which nothing is left is forgotten."""
    store = SampleStore(max_samples=2 * BLOCK_SAMPLES)
    store.add([sample(pid=7)])
    for second in range(300):
        store.add(reading(second, pid=8))

    held = list(store.between(0, 2**62))
    assert len(held) <= 2 * BLOCK_SAMPLES
    assert held[-SERIES:] == reading(299, pid=8)
    assert store.counters() == {
        "samples": 1 + 300 * SERIES,
        "samples_evicted": 1 + 300 * SERIES - len(held),
    }
    latest = store.latest(0)
    assert [one for one, _ in latest] == reading(299, pid=8)
    assert latest[1][1] == sum(4096.0 * (second // 10) for second in range(300))


def test_samples_take_little() -> None:
    """Less than half of the 28 bytes that columns as they are would take."""
    readings = [reading(second) for second in range(400)]
    tracemalloc.start()
    try:
        store = SampleStore()
        for samples in readings:
            store.add(samples)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store.gauges()["samples_held"] == 400 * SERIES
    assert held < 14 * 400 * SERIES


def test_an_agent_forgets_what_is_old_but_not_while_a_run_is_open(spool: Path) -> None:
    """Half an hour is kept, or as long as a run has been open that a driver opened."""
    clock = HandClock(10**15)
    agent = Agent(spool, {}, clock=clock)
    for second in range(80):
        agent.evidence.samples.add(reading(second))
    clock.now_ns += int((KEEP_S + 100) * 1e9)

    agent.runs.open("r-1")
    begun_s = time.time() - KEEP_S - 600
    os.utime(spool / RUNS_FOLDER / f"r-1{OPEN_RUN_SUFFIX}", (begun_s, begun_s))
    agent.hurry()
    agent.step()
    assert agent.evidence.samples.counters()["samples_evicted"] == 0

    agent.runs.close_run("r-1")
    agent.hurry()
    agent.step()
    agent.close()
    assert agent.evidence.samples.counters()["samples_evicted"] > 60 * SERIES
