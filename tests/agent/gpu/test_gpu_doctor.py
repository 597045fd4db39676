"""What the doctor says of NVIDIA's driver, by a real process and the stand-in for its library."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from stagescope.testing.spool import short_spool
from tests.support.nvml import DRIVER_NOT_LOADED, GPU_IS_LOST, NO_PERMISSION, StandIn

Told = Callable[..., dict[str, Any]]


@pytest.fixture
def told(stand_in: StandIn) -> Iterator[Told]:
    """Runs the doctor with a driver that answers by lines; returns its line, and if gpu is possible."""
    with short_spool() as spool:

        def run(*lines: str) -> dict[str, Any]:
            stand_in.tell(*lines)
            words = [
                "doctor",
                "--format",
                "json",
                "--spool",
                str(spool),
                "--proc",
                str(_bare(spool)),
            ]
            done = subprocess.run(
                [sys.executable, "-m", "stagescope", *words],
                env={**os.environ, **stand_in.environment()},
                capture_output=True, text=True, check=True, timeout=60,
            )  # fmt: skip
            found = json.loads(done.stdout)
            (line,) = [one for one in found["checks"] if one["name"] == "nvidia"]
            return {**line, "possible": found["measurable"]["gpu"]["possible"]}

        yield run


def _bare(spool: Path) -> Path:
    """A /proc in which nobody has a driver."""
    made = spool / "proc"
    made.mkdir(exist_ok=True)
    return made


def test_devices_are_named(told: Told) -> None:
    """How many, which, the driver's version; GPM where they have it, and where not."""
    line = told("devices 0 2")
    assert (line["status"], line["possible"]) == ("ok", True)
    assert line["told"].startswith("2 GPUs (")
    assert "GPM counters" in line["told"]
    assert [one["uuid"] for one in line["facts"]["devices"]] == ["GPU-00000000", "GPU-00000001"]
    assert "no GPM" in told("gpm 0 0")["told"]


def test_a_lost_device_leaves_the_others(told: Told) -> None:
    """One that does not answer is told with its error; the others are measured."""
    line = told("devices 0 2", f"fail nvmlDeviceGetHandleByIndex_v2 1 {GPU_IS_LOST}")
    assert (line["status"], line["possible"]) == ("warn", True)
    assert "GPU 1 does not answer (NVMLError_GpuIsLost)" in line["told"]
    assert "dmesg | grep Xid" in line["do"][0]


def test_what_keeps_the_driver_from_answering_is_named(told: Told) -> None:
    """Not loaded, no devices, no permission: each with what to do."""
    line = told(f"init 0 {DRIVER_NOT_LOADED}")
    assert (line["status"], line["possible"]) == ("no", False)
    assert "no NVIDIA driver here (NVMLError_DriverNotLoaded)" in line["told"]
    line = told("devices 0 0")
    assert line["told"] == "the driver answers and gives no device"
    assert line["do"][0].startswith("docker run --gpus all")
    line = told(f"init 0 {NO_PERMISSION}")
    assert line["told"] == "the NVIDIA driver refuses: NVMLError_NoPermission"
    assert line["do"] == ["run as a user who may open /dev/nvidia*"]
