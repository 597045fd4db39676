"""Nothing of a process's CPU time is lost or invented when it is shared out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.analysis.resources.cpu import Running, share_error, shared_out
from stagescope.stages import stage_of

PIDS = st.integers(1, 3)
NAMES = st.sampled_from(["queue", "queue.batch", "inference", "mine", "other"])
RUNNING = st.builds(Running, PIDS, NAMES, st.integers(0, 10**12), st.integers(0, 1000))
CPU = st.dictionaries(PIDS, st.floats(0, 1e6), max_size=3)


@given(CPU, st.lists(RUNNING, max_size=12), st.lists(NAMES, max_size=3))
def test_the_rows_sum_to_the_total(
    cpu_s: dict[int, float], running: list[Running], stages: list[str]
) -> None:
    """All stages and the processes that were not sampled are the total, by either name."""
    for name_of in (str, stage_of):
        found, unsampled = shared_out(cpu_s, running, stages, name_of)

        total = sum(cpu.cpu_s for cpu in found.values()) + unsampled
        assert total == pytest.approx(sum(cpu_s.values()))
        assert all(cpu.cpu_s >= 0 and cpu.error_s >= 0 for cpu in found.values())


@given(CPU, st.lists(RUNNING, max_size=12))
def test_a_stage_is_the_sum_of_its_sub_stages(
    cpu_s: dict[int, float], running: list[Running]
) -> None:
    """Shares by outer stage and by full name agree."""
    full, _ = shared_out(cpu_s, running, (), str)
    outer, _ = shared_out(cpu_s, running, (), stage_of)

    for name, cpu in outer.items():
        inside = sum(each.cpu_s for stage, each in full.items() if stage_of(stage) == name)
        assert cpu.cpu_s == pytest.approx(inside)


def test_each_process_by_its_own_samples() -> None:
    """A busy process's samples say nothing of an idle one's, and one without samples is apart."""
    running = [
        Running(1, "inference", 300, 3),
        Running(1, "other", 100, 1),
        Running(2, "mine", 9, 9),
    ]

    found, unsampled = shared_out({1: 8.0, 2: 1.0, 3: 0.5}, running, ["respond"], str)

    assert {name: cpu.cpu_s for name, cpu in found.items()} == {
        "inference": 6.0,
        "other": 2.0,
        "mine": 1.0,
        "respond": 0.0,
    }
    assert unsampled == 0.5
    assert found["inference"].samples == 3


def test_the_error_is_binomial() -> None:
    """With many samples it is `sqrt(p(1-p)/n)`; what was never seen still has one."""
    assert share_error(0.2, 10_000) == pytest.approx((0.2 * 0.8 / 10_000) ** 0.5, rel=1e-3)
    assert 0 < share_error(0.0, 100) < 0.01
    assert share_error(0.5, 0) == 1.0
