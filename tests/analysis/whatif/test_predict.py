"""Predictions, held against queues whose waiting times are computed by recursions."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagescope.analysis.sources import open_run
from stagescope.analysis.whatif.changes import changed
from stagescope.analysis.whatif.model import Pipeline
from stagescope.analysis.whatif.predict import Estimate, WhatIf, predict
from stagescope.analysis.whatif.trace import read_pipeline
from stagescope.errors import UsageError
from tests.support.queues import arrivals, loop_run, percentiles, services, thread_run
from tests.support.runs import MS, client_row, failed_row, server_row, write_run_folder

COUNT = 600
AFTER_MS = 5.0


def loop(folder: Path, seed: int = 1, spread: float = 0.3) -> Path:
    """Write a run of a loop that is 70 % busy."""
    at, spent = arrivals(70, COUNT, seed), services(10, spread, COUNT, seed)
    return loop_run(folder, at, spent, AFTER_MS)


def threads(folder: Path, seed: int = 1) -> Path:
    """Write a run of two threads that are 80 % busy."""
    at, spent = arrivals(80, COUNT, seed), services(20, 0.3, COUNT, seed)
    return thread_run(folder, at, spent, 2)


def holds(found: WhatIf, true: tuple[float, float]) -> bool:
    """Return whether the one prediction's p50 is right within 10 %, and its p99 in its interval."""
    (one,) = found.predictions
    assert one.p99_ms.low is not None
    assert one.p99_ms.high is not None
    right = one.p50_ms.value == pytest.approx(true[0], rel=0.1)
    return right and one.p99_ms.low <= true[1] <= one.p99_ms.high


def test_the_unchanged_run_is_simulated_as_it_was_measured(tmp_path: Path) -> None:
    """Queue for the loop and for a thread: both figures within 2 % of what the recursion gives."""
    for made in (loop(tmp_path / "loop"), threads(tmp_path / "threads")):
        found = predict(made, ["inference +0ms"])

        assert found.agrees
        assert found.simulated.p50_ms == pytest.approx(found.measured.p50_ms, rel=0.02)
        assert found.simulated.p99_ms == pytest.approx(found.measured.p99_ms, rel=0.02)


@pytest.mark.parametrize(
    ("change", "factor", "more_ms", "after_ms"),
    [
        ("preprocess -20%", 0.8, 0.0, AFTER_MS),
        ("preprocess +1ms", 1.0, 1.0, AFTER_MS),
        ("preprocess -20%,inference +5ms", 0.8, 0.0, AFTER_MS + 5),
    ],
)
def test_a_stage_that_takes_less_or_more(
    change: str, factor: float, more_ms: float, after_ms: float, tmp_path: Path
) -> None:
    """Its queue shrinks or grows with it, as the recursion over the same arrivals says."""
    at, spent = arrivals(70, COUNT, 1), services(10, 0.3, COUNT, 1)

    found = predict(loop_run(tmp_path, at, spent, AFTER_MS), [change])

    assert holds(found, percentiles(at, spent * factor + more_ms, 1, after_ms))


@pytest.mark.parametrize("size", [1, 3])
def test_more_threads_or_fewer(size: int, tmp_path: Path) -> None:
    """A pool of another size; with one thread the queue grows without end."""
    at, spent = arrivals(80, COUNT, 1), services(20, 0.3, COUNT, 1)

    found = predict(thread_run(tmp_path, at, spent, 2), [f"threads={size}"])

    assert holds(found, percentiles(at, spent, size, 0.0))


def test_another_rate(tmp_path: Path) -> None:
    """Arrivals move together: the median's queue is that of the busier loop."""
    found = predict(loop(tmp_path), ["rate=85"])

    at, spent = arrivals(85, 4 * COUNT, 7), services(10, 0.3, 4 * COUNT, 7)
    true_p50, _ = percentiles(at, spent, 1, AFTER_MS)
    assert found.predictions[0].p50_ms.value == pytest.approx(true_p50, rel=0.25)
    assert found.predictions[0].throughput_per_s.value == pytest.approx(85, rel=0.05)


def test_intervals_hold_what_they_say(tmp_path: Path) -> None:
    """Of 16 predicted figures, of runs whose times are drawn anew, most lie within."""
    held = []
    for seed in range(4):
        found = predict(
            loop(tmp_path / str(seed), seed, 0.5), ["preprocess -25%", "inference +3ms"]
        )
        at, fresh = arrivals(70, COUNT, seed), services(10, 0.5, COUNT, seed + 100)
        truths = (
            percentiles(at, fresh * 0.75, 1, AFTER_MS),
            percentiles(at, fresh, 1, AFTER_MS + 3),
        )
        for one, true in zip(found.predictions, truths, strict=True):
            for estimate, figure in zip((one.p50_ms, one.p99_ms), true, strict=True):
                assert estimate.low is not None
                assert estimate.high is not None
                held.append(estimate.low <= figure <= estimate.high)
    assert sum(held) >= 13


def test_near_capacity_the_interval_is_wide(tmp_path: Path) -> None:
    """There a few percent of the machine's speed decide; far from it they do not."""
    near, far = predict(loop(tmp_path), ["rate=98", "rate=40"]).predictions

    def width(one: Estimate) -> float:
        assert one.low is not None
        assert one.high is not None
        return (one.high - one.low) / one.value

    assert width(near.p50_ms) > 1
    assert width(far.p50_ms) < 0.5


def test_the_same_seed_predicts_the_same(tmp_path: Path) -> None:
    """Two calls agree to the last digit."""
    made = loop(tmp_path)
    assert predict(made, ["rate=60"], seed=3) == predict(made, ["rate=60"], seed=3)


def test_what_is_not_simulated_is_said_and_nothing_is_predicted_with_confidence(
    tmp_path: Path,
) -> None:
    """Steps of the loop that last longer than requests come apart: it cannot have been one loop."""
    clients, served = [], []
    for seq in range(200):
        client = client_row(seq)
        intended = 1_000 * MS + seq * 10 * MS
        client |= dict.fromkeys(("intended_ns", "started_ns", "connected_ns", "sent_ns"), intended)
        client["last_byte_ns"] = intended + 40 * MS
        clients.append(client)
        facts = [{"kind": "ran", "loop": 0, "start_ns": 0, "end_ns": 30 * MS}]
        served.append(server_row(client, {"preprocess": 30 * MS}, wait_facts=facts))
    made = write_run_folder(tmp_path, clients, served)

    found = predict(made, ["preprocess -20%"])

    assert not found.agrees
    assert any("p50_ms" in sentence for sentence in found.disagrees)
    (one,) = found.predictions
    assert one.p50_ms.low is None
    assert one.p99_ms.high is None


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Pipeline:
    """Return the pipeline of a loop that is 70 % busy."""
    tables = open_run(loop(tmp_path_factory.mktemp("run")))
    try:
        return read_pipeline(tables)
    finally:
        tables.backend.disconnect()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("faster", "not understood"),
        ("inference -120%", "less than no time"),
        ("tokenize -10%", "no stage tokenize"),
        ("threads=0", "from 1 to"),
        ("threads=2.5", "not understood"),
        ("threads.decode=2", "no worker thread"),
        ("batch.delay=5ms", "no batches"),
        ("batch.size=4", "no batches"),
        ("workers=0", "from 1 to"),
        ("rate=0", "from 0.01 to"),
        ("rate=99999999", "from 0.01 to"),
        ("", "not understood"),
    ],
)
def test_a_bad_change_is_one_sentence(change: str, said: str, pipeline: Pipeline) -> None:
    """It names the change and what is wrong with it."""
    with pytest.raises(UsageError, match=said) as problem:
        changed(pipeline, change)
    assert repr(change) in str(problem.value)


def _steady(count: int) -> list[dict[str, object]]:
    return [client_row(seq) for seq in range(count)]


def test_a_run_that_cannot_be_simulated_is_one_sentence(tmp_path: Path) -> None:
    """No server side; no wait facts; too few requests, which are an INVALID run; most failed."""
    clients = _steady(120)
    served = [server_row(row, {"inference": 5 * MS}) for row in clients]
    facts = [{"kind": "ran", "loop": 0, "start_ns": 0, "end_ns": MS}]
    running = [row | {"wait_facts": facts} for row in served]
    elsewhere = [row | {"boot_id": "another"} for row in running]
    failed = [*clients, *(failed_row(seq, "timeout") for seq in range(120, 140))]
    for number, (client, server, said) in enumerate([
        (clients, served, "does not say when its requests ran"),
        (clients, elsewhere, "same clock"),
        (clients[:1], running[:1], "INVALID"),
        (failed, running, "failed"),
    ]):  # fmt: skip
        folder = write_run_folder(tmp_path / str(number), client, server)
        with pytest.raises(UsageError, match=said):
            predict(folder, ["inference -20%"])
