"""Intervals of percentiles: they hold the true one as often as they say, and none is made up."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagescope.analysis.build import build_report
from stagescope.analysis.intervals import least, ranks
from tests.support.runs import MS, client_row, write_run_folder


def test_the_least_number_of_requests() -> None:
    """A 99th percentile takes 368 values at least: with one fewer there is no interval."""
    assert least(0.99) == 368
    assert ranks(367, 0.99) is None
    assert ranks(368, 0.99) is not None
    assert ranks(5, 0.5) is None
    assert ranks(6, 0.5) == (0, 5)


@pytest.mark.parametrize(("count", "quantile"), [(50, 0.5), (400, 0.95), (1000, 0.99)])
def test_coverage(count: int, quantile: float) -> None:
    """Of 2,000 samples at least 93 in 100 have the true percentile in their interval."""
    pair = ranks(count, quantile)
    assert pair is not None
    samples = np.sort(np.random.default_rng(1).random((2000, count)), axis=1)
    inside = (samples[:, pair[0]] <= quantile) & (quantile <= samples[:, pair[1]])

    assert inside.mean() >= 0.93


def test_a_report_has_them(tmp_path: Path) -> None:
    """They are values that were measured, and a p99 of too few requests has none."""
    client = [client_row(seq, latency_ns=(seq + 20) * MS) for seq in range(200)]

    latency = build_report(write_run_folder(tmp_path, client)).client.latency

    assert latency is not None
    low, high = ranks(200, 0.5) or (0, 0)
    assert latency.p50_interval_ms == pytest.approx((low + 20, high + 20))
    assert latency.p99_interval_ms is None
