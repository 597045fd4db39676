"""`benchmarks/gpu_capture.py` runs through on a CPU, and says so where there is no device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "gpu_capture.py"


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run the script to its end, with no device to be seen."""
    return subprocess.run(
        [sys.executable, SCRIPT, *words], capture_output=True, text=True, check=False, timeout=100,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def test_figures_of_a_process_without_a_device() -> None:
    """Two captures of one process, with what its batches took before, within and after."""
    done = run("--cpu")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["cpu"]

    first, second = found["captures"]
    assert (first["degraded"], second["degraded"]) == ("", "")
    assert first["batches"] >= 2
    assert {one["stage"] for one in first["stages"]} >= {"inference"}
    assert second["longest_batch_ms"] >= second["recorded_batch_ms"] > 0


def test_without_a_device_it_is_one_sentence() -> None:
    """Exit code 1, and nothing on standard output."""
    done = run()

    assert (done.returncode, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert line == "gpu_capture: torch sees no CUDA device here, so there is nothing to measure"
