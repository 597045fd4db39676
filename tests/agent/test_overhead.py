"""The governor: sheds in order, slowly takes back, is spared load runs; and what it costs, told."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.collectors import Metered, PeriodicTask
from stagescope.agent.loop import Agent
from stagescope.agent.overhead import (
    CALM,
    MOST_PATIENCE_S,
    RECOVER_S,
    SHEDS,
    SPARED_AFTER_S,
    WINDOW_S,
    Governor,
    LimiterState,
    Usage,
    budget,
    judge,
)
from stagescope.agent.store.samples import SampleStore
from stagescope.testing.clock import HandClock
from stagescope.testing.spool import short_spool

BUDGET = 0.01
STEP_S = 5.0

shares = st.lists(st.one_of(st.none(), st.floats(0, 3 * BUDGET)), min_size=1, max_size=300)


def stands(given_shares: Sequence[float | None]) -> list[tuple[float, LimiterState]]:
    """Judge one share each STEP_S, as if each were measured; give seconds and standings."""
    standing, seen = LimiterState(), [(0.0, LimiterState())]
    for index, share in enumerate(given_shares, 1):
        now_s = index * STEP_S
        whole = now_s - standing.since_ns / 1e9 >= WINDOW_S
        standing = judge(standing, share if whole else None, int(now_s * 1e9), BUDGET)
        seen.append((now_s, standing))
    return seen


def steps(seen: list[tuple[float, LimiterState]]) -> list[tuple[float, int]]:
    """Return seconds and direction of each step."""
    return [
        (at_s, now.level - before.level)
        for (_, before), (at_s, now) in pairwise(seen)
        if now.level != before.level
    ]


@given(shares)
def test_it_goes_one_step_at_a_time_and_no_step_within_a_window(
    given_shares: list[float | None],
) -> None:
    """Levels stay in bounds, change by one, and a window lies between any two changes."""
    seen = stands(given_shares)
    assert all(0 <= standing.level <= len(SHEDS) for _, standing in seen)
    taken = steps(seen)
    assert all(abs(direction) == 1 for _, direction in taken)
    assert all(later - earlier >= WINDOW_S for (earlier, _), (later, _) in pairwise(taken))


@given(shares)
def test_it_does_not_oscillate_faster_than_it_recovers(given_shares: list[float | None]) -> None:
    """Before a step is taken back it was calm for RECOVER_S, whatever the readings are."""
    taken = steps(stands(given_shares))
    for (earlier_s, _), (later_s, direction) in pairwise(taken):
        if direction < 0:
            assert later_s - earlier_s >= RECOVER_S


@given(st.floats(1.01 * BUDGET, 1), st.floats(0, CALM * BUDGET))
def test_it_sheds_everything_and_takes_all_back(high: float, low: float) -> None:
    """Too much for long sheds every step in order; calm for long takes every one back."""
    busy, calm = 40, 400
    seen = stands([high] * busy + [low] * calm)
    assert [direction for _, direction in steps(seen)] == [1] * len(SHEDS) + [-1] * len(SHEDS)


@given(st.lists(st.floats(CALM * BUDGET * 1.001, BUDGET), min_size=1, max_size=300))
def test_between_calm_and_budget_nothing_changes(readings: list[float]) -> None:
    """Hysteresis: what is near the budget neither sheds nor recovers."""
    shed = stands([2 * BUDGET] * 7)
    seen = stands([*[2 * BUDGET] * 7, *readings])
    assert shed[-1][1].level == seen[-1][1].level == 1


def test_a_step_that_is_needed_again_is_taken_back_more_and_more_rarely() -> None:
    """A cost that comes back with each step taken back: patience doubles, to an hour."""
    standing, now_s, gaps, shed_s = LimiterState(), 0.0, [], 0.0
    while now_s < 40_000:
        now_s += STEP_S
        whole = now_s - standing.since_ns / 1e9 >= WINDOW_S
        share = (2 * BUDGET if standing.level == 0 else 0.0) if whole else None
        after = judge(standing, share, int(now_s * 1e9), BUDGET)
        if after.level > standing.level:
            shed_s = now_s
        elif after.level < standing.level:
            gaps.append(now_s - shed_s)
        standing = after
    assert gaps == sorted(gaps)
    assert gaps[0] < 2 * RECOVER_S
    assert gaps[-1] >= MOST_PATIENCE_S


def test_usage_is_known_only_for_a_whole_window_after_the_last_step() -> None:
    """No share before WINDOW_S have passed since *since_ns*; then CPU by time."""
    usage = Usage()
    for second in range(0, 61, 5):
        usage.add(second * 10**9, second * 0.02)
        assert (usage.share(0) is None) == (second < WINDOW_S)
    assert usage.share(0) == pytest.approx(0.02)
    assert usage.share(31 * 10**9) is None


class Child:
    """A collector whose child uses *share* of a core; its own thread uses next to nothing."""

    period_s = STEP_S

    def __init__(self, name: str, clock: HandClock) -> None:
        self.name = name
        self.clock = clock
        self.share = 0.0
        self.used_s = 0.0
        self._last_ns = clock()

    def collect(self) -> None:
        """Use CPU."""
        now_ns = self.clock()
        self.used_s += self.share * (now_ns - self._last_ns) / 1e9
        self._last_ns = now_ns

    def children_cpu_s(self) -> float:
        """Return what the child has used."""
        return self.used_s

    def close(self) -> None:
        """Nothing was begun."""


class World:
    """A governor with one collector named *name*, on a clock by hand."""

    def __init__(self, name: str = "gpu") -> None:
        self.clock = HandClock()
        self.run = False
        self.samples = SampleStore()
        self.child = Child(name, self.clock)
        self.metered = Metered(self.child, self.clock)
        self.governor = Governor(
            self.samples, budget=BUDGET, run_under_way=lambda: self.run, clock=self.clock
        )
        self.governor.watch([self.metered])

    def live(self, seconds: float) -> None:
        """Let *seconds* pass."""
        for _ in range(int(seconds / STEP_S)):
            self.clock.tick(int(STEP_S * 1e9))
            self.metered.collect(self.clock())
            self.governor.collect()


def test_cpu_of_children_counts_and_things_go_in_order(caplog: pytest.LogCaptureFixture) -> None:
    """A child's CPU sheds captures, micro-captures, stack rate, stacks, GPM; each logged once."""
    world = World()
    world.child.share = 0.05
    gone = []
    for _ in SHEDS:
        world.live(WINDOW_S + STEP_S)
        gone.append([what for what in SHEDS if not world.governor.allowed(what)])
    assert gone == [list(SHEDS[:count]) for count in range(1, len(SHEDS) + 1)]
    assert len(caplog.messages) == len(SHEDS)
    assert "5.00 % of one core" in caplog.messages[0]
    assert "their budget is 1.00 %" in caplog.messages[0]
    assert world.governor.counters()["governor_sheds"] == len(SHEDS)
    assert world.governor.gauges()["governor_level"] == len(SHEDS)


def test_the_rate_of_stacks_is_halved_and_then_none() -> None:
    """The factor follows the level: 1, 0.5, 0."""
    world = World()
    world.child.share = 0.05
    factors = [world.governor.stack_rate_factor()]
    for _ in SHEDS:
        world.live(WINDOW_S + STEP_S)
        factors.append(world.governor.stack_rate_factor())
    assert factors == [1.0, 1.0, 1.0, 0.5, 0.0, 0.0]


def test_stacks_of_a_load_run_are_reported_but_not_judged() -> None:
    """While a run is under way the stack sampler may cost more, and its cost is told."""
    world = World("stacks")
    world.child.share, world.run = 0.2, True
    world.live(300)
    assert world.governor.gauges()["governor_level"] == 0
    assert world.governor.counters()["governor_exempt_cpu_s"] == pytest.approx(60, rel=0.01)
    world.run = False
    world.live(SPARED_AFTER_S)
    assert world.governor.counters()["governor_judged_cpu_s"] < 0.1
    world.live(5 * (WINDOW_S + STEP_S))
    assert world.governor.stack_rate_factor() == 0.0
    world.run = True
    assert world.governor.stack_rate_factor() == 1.0
    assert world.governor.allowed("stacks")


def test_each_collectors_cost_is_a_sample() -> None:
    """Lateness and stall of each collector, for the stretch since the last reading."""
    world = World()
    world.live(10)
    found = list(world.samples.between(0, world.clock()))
    assert {(one.name, one.detail) for one in found} == {
        (f"stagescope.collector.{what}_time", "gpu") for what in ("late", "stall")
    }
    late = [one for one in found if one.name == "stagescope.collector.late_time"]
    assert [one.end_ns - one.start_ns for one in late] == [int(STEP_S * 1e9)] * 2


def test_what_is_never_shed_is_no_question() -> None:
    """Asking for a word that is not in SHEDS is a mistake of ours, and raises."""
    with pytest.raises(ValueError, match="not in tuple"):
        World().governor.allowed("tea")


def test_budget_as_given() -> None:
    """Unset it is 1 % of one core; `off` is no bound."""
    assert budget({}) == 0.01
    assert budget({"STAGESCOPE_AGENT_BUDGET": "0.05"}) == 0.05
    assert budget({"STAGESCOPE_AGENT_BUDGET": "off"}) == float("inf")


def test_metered_counts_children_and_how_long_the_loop_was_held() -> None:
    """Counters of a collector hold its child's CPU and the time that it held up the loop."""
    clock = HandClock()

    def hold_up() -> None:
        clock.tick(3_000_000)

    metered = Metered(PeriodicTask("slow", 1.0, hold_up), clock)
    metered.collect(clock())
    assert metered.counters()["collector_slow_stall_s"] == pytest.approx(0.003)
    child = Child("gpu", clock)
    child.used_s = 7.0
    assert Metered(child, clock).counters()["collector_gpu_cpu_s"] == 7.0


def test_an_agent_tells_what_its_samplers_cost() -> None:
    """Cost of each sampler and of the governor itself, its level, and samples of them."""
    with short_spool() as spool:
        clock = HandClock(1000 * 10**9)
        agent = Agent(
            spool, {}, samplers=lambda _: [PeriodicTask("idle", 1.0, lambda: None)], clock=clock
        )
        for _ in range(3):
            agent.step()
            clock.tick(int(STEP_S * 1e9))
        told = {**agent.counters(), **agent.gauges()}
        samples = agent.evidence.samples.between(0, clock())
        agent.close()
    assert told["collector_idle_calls"] == 3
    assert told["collector_governor_cpu_s"] > 0
    assert (told["governor_level"], told["governor_budget"]) == (0, 0.01)
    assert {sample.detail for sample in samples} >= {"idle", "governor"}
