"""The benchmarks of device times run, or say why not; no time is asserted."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(name: str) -> subprocess.CompletedProcess[str]:
    """Run a benchmark where no GPU is to be seen."""
    return subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / name)],
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip


def test_without_a_gpu_it_is_one_sentence() -> None:
    """It says why nothing is measured, and fails."""
    done = run("gpu_device.py")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "torch sees no GPU here, so there are no device times to measure\n"


def test_our_own_part_needs_none() -> None:
    """A line for each of those who may watch."""
    done = run("device_cost.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" µs a stage") == 4
