"""A thread's clock: the run queue is looked at where the thread was off its core, and only there."""

from __future__ import annotations

import time

import pytest

from stagescope.middleware.runtime import thread_clock
from stagescope.middleware.runtime.thread_clock import FLOOR_NS, UNREAD_NS, ThreadClock

MS = 1_000_000


class Planted(ThreadClock):
    """Its thread ran and waited for a core for as long as is said here."""

    ran_ns = waited_ns = read = 0

    def queued_ns(self) -> int:
        """Return what was planted, and count that it was asked for."""
        self.read += 1
        return self.waited_ns


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Planted:
    """A clock that has just been made."""
    monkeypatch.setattr(time, "thread_time_ns", lambda: Planted.ran_ns)
    monkeypatch.setattr(thread_clock, "_now", lambda: 0)
    made = Planted()
    monkeypatch.setattr(time, "thread_time_ns", lambda: made.ran_ns)
    made.read = 0
    return made


def test_a_thread_on_its_core_is_asked_for_its_cpu_time_alone(clock: Planted) -> None:
    """Ten looks at a thread that computes all the time do not read the run queue."""
    for at_ns in range(MS, 11 * MS, MS):
        clock.ran_ns = at_ns - FLOOR_NS // 10
        assert clock.look(at_ns)[:2] == (clock.ran_ns, 0)
    assert clock.read == 0


def test_time_off_the_core_adds_up_until_the_run_queue_is_read(clock: Planted) -> None:
    """Of a thread that waits 90 us in each ms the queue is read at every third look."""
    seen = []
    for number in range(1, 10):
        clock.ran_ns = number * (MS - 90_000)
        clock.waited_ns = number * 90_000
        seen.append(clock.look(number * MS)[1])
    assert clock.read == 3
    assert seen[2::3] == [3 * 90_000, 6 * 90_000, 9 * 90_000]


def test_a_step_that_was_off_its_core_is_told_exactly(clock: Planted) -> None:
    """What a step of 10 ms waited for a core is known, though its thread slept for long before."""
    clock.ran_ns, clock.waited_ns = MS, 5 * MS
    before = clock.look(100 * MS)
    clock.ran_ns, clock.waited_ns = 7 * MS, 9 * MS
    after = clock.look(110 * MS, clock.unread_ns + FLOOR_NS)
    assert (after[0] - before[0], after[1] - before[1]) == (6 * MS, 4 * MS)


def test_a_look_just_after_another_one_costs_nothing(clock: Planted) -> None:
    """Within 50 us it says what it said."""
    clock.ran_ns = MS
    first = clock.look(2 * MS)
    clock.ran_ns = MS + 10_000
    assert clock.look(2 * MS + 10_000) is first


def test_a_thread_that_was_handed_work_slept_until_then(clock: Planted) -> None:
    """Its idle hour is no reason to read the run queue; a long way from hand to begin is one."""
    clock.begin(3600_000 * MS, 3600_000 * MS - UNREAD_NS // 2)
    assert clock.read == 0
    clock.begin(7200_000 * MS, 7200_000 * MS - 2 * UNREAD_NS)
    assert clock.read == 1


def test_the_kernels_figures_of_this_thread() -> None:
    """They are those of the thread that asks, and grow while it computes."""
    clock = ThreadClock()
    before = clock.reading
    used_ns = time.thread_time_ns()
    while time.thread_time_ns() - used_ns < 20 * MS:
        pass
    after = clock.look(time.monotonic_ns())
    assert 19 * MS <= after[0] - before[0] <= 200 * MS
    assert after[1] >= before[1]
    assert after[2] >= before[2]
