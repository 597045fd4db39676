"""A seeded choice of the planted servers: the verdict names what was planted, or who took the cores.

`make planted` runs them all. On a busy machine `host` is the true answer, whatever else was
planted, or the driver was late and the run bears no verdict; so these count as right here, where
nobody can ask for quiet.
"""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.planted.__main__ import at_least, at_most, line
from tests.planted.run import outcome
from tests.planted.shapes import PLANTED, Shape

_choice = random.Random(int(os.environ.get("PLANTED_SEED", "1")))
SURE = ("loop_block", "dep_store", "model_queue", "errors_status", "batching_delay", "loop_burn")
CHOSEN = [next(one for one in PLANTED if one.name == name) for name in _choice.sample(SURE, 2)]


@pytest.mark.parametrize("shape", CHOSEN, ids=lambda shape: shape.name)
def test_the_verdict_names_what_was_planted(shape: Shape, tmp_path: Path) -> None:
    """A server with one bottleneck, driven beyond it: kind and stage are those planted."""
    one = outcome(shape, 2, tmp_path / "run")
    print(line(one))

    verdict = one.verdict
    late = verdict.kind == "undetermined" and "driver late" in verdict.evidence[0]
    assert one.right or verdict.kind == "host" or late, verdict
    assert not one.wrong_and_confident or verdict.kind == "host"
    assert verdict.next_steps
    assert len(verdict.rivals) >= 20


def test_the_bounds_are_those_of_clopper_and_pearson() -> None:
    """Of 30 right answers the share is at least 0.905, and of no wrong one in 150 at most 0.02."""
    assert at_least(30, 30) == pytest.approx(0.05 ** (1 / 30), abs=1e-6)
    assert at_most(0, 150) == pytest.approx(1 - 0.05 ** (1 / 150), abs=1e-6)
    assert at_least(67, 72) == pytest.approx(0.8603, abs=2e-3)
