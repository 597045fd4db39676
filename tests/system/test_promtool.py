"""Prometheus's own linter finds nothing to say about the metrics that are made of samples.

Needs the program `promtool` (Debian: `apt-get install -y prometheus`), so it is not part of
`make test`; `make test-system` runs it.
"""

from __future__ import annotations

import shutil
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from stagescope.exporters.prometheus import CostCollector, SampleCollector
from stagescope.exporters.sample_series import Series, Shown
from stagescope.sample_names import SAMPLE_NAMES
from tests.support.evidence import sample

pytestmark = pytest.mark.system

COUNT = 'non-histogram and non-summary metrics should not have "_count" suffix'
"""OpenTelemetry's `process.thread.count` becomes such a name by its own rules."""


def test_promtool_has_nothing_to_say() -> None:
    """Every published name of a sample, by name, unit, kind and labels."""
    program = shutil.which("promtool")
    assert program, "the program `promtool` is missing: apt-get install -y prometheus"
    series = [
        Series(named, sample(name=named.name, pid=7, device="GPU-1", detail=detail), 1.0, "api")
        for named in SAMPLE_NAMES
        for detail in ("one", "two")
    ]
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SampleCollector(lambda: Shown(tuple(series))))
    cost = {"calls": 1, "late_s": 0.1, "longest_s": 0.1}
    registry.register(CostCollector(lambda: {"host": cost}))
    checked = subprocess.run(
        [program, "check", "metrics"],
        input=generate_latest(registry),
        capture_output=True,
        check=False,
    )

    said = checked.stderr.decode().splitlines()
    assert checked.returncode in (0, 3)  # 1: it cannot be read; 3: something to say
    assert [line for line in said if not line.endswith(COUNT)] == []
