"""A streaming server under load: the table of stages and that of CPU time name the same stage."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from stagescope import load_run
from stagescope.analysis.build import build_report
from stagescope.analysis.report import Part
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.server_processes import free_port, port_is_free

SERVER = Path(__file__).with_name("burning_streams.py")


def own_ms(part: Part) -> float:
    """Return the mean of a row as the table shows it: without what waited."""
    return part.own.mean_ms if part.own else part.mean_ms


@pytest.mark.parametrize(("path", "stage"), [("marked", "inference"), ("unmarked", "endpoint")])
def test_what_a_generator_burns_is_one_stage_in_both(path: str, stage: str, tmp_path: Path) -> None:
    """Most of the server's time, most of its CPU time and the burning line are in that stage."""
    port = free_port()
    environment = os.environ | {"STAGESCOPE_AGENT": "off"}
    with (
        short_spool() as spool,
        AgentProcesses() as agents,
        subprocess.Popen(
            [sys.executable, SERVER, str(port)],
            env=environment | {"STAGESCOPE_SPOOL": str(spool)},
        ) as server,
    ):
        try:
            agents(spool)
            wait_until(lambda: not port_is_free(port), 30)
            folder = load_run(
                f"http://127.0.0.1:{port}/{path}",
                rate_per_s=6, duration_s=9, warmup_s=0, out=tmp_path / "run", spool=spool,
            )  # fmt: skip
        finally:
            server.kill()
    report = build_report(folder)

    assert max(report.stages, key=own_ms).name == stage
    assert report.resources
    cpu_s = {use.stage: use.cpu.cpu_s for use in report.resources.stages if use.cpu}
    assert max(cpu_s, key=lambda name: cpu_s[name] * (name != "other")) == stage
    (used,) = (use for use in report.resources.stages if use.stage == stage)
    assert used.stacks[0].frame.startswith("burn_prefill ")
    assert cpu_s.get("respond", 0) < 0.2 * cpu_s[stage]
