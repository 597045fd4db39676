"""The check of a real GPU as people run it, on machines without one; no figure is asserted."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest

from stagescope.testing import wait_until
from tests.support.nvml import StandIn, compile_stand_in

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

PLANTED = """
import os, subprocess, sys, time
from pathlib import Path

def good():
    return {"figure": 1.5}

def bad():
    raise ValueError("a planted fault")

def endless():
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {child.pid}")
    time.sleep(600)

def ends():
    os._exit(7)

GOOD = {"one": good, "two": good}
BAD = {"first": good, "fault": bad, "last": good}
ENDLESS = {"before": good, "endless": endless}
ENDS = {"before": good, "ends": ends}
"""


def command(*words: object) -> list[str]:
    """Return the command of the check."""
    return [sys.executable, str(BENCHMARKS / "gpu_check.py"), *map(str, words)]


def environment(folder: Path) -> dict[str, str]:
    """Return one without a GPU, in which the planted module is found."""
    (folder / "planted.py").write_text(PLANTED)
    return os.environ | {
        "CUDA_VISIBLE_DEVICES": "", "PIDS": str(folder / "pids"), "OUT": str(folder),
        "PYTHONPATH": os.pathsep.join((str(folder), os.environ["PYTHONPATH"])),
    }  # fmt: skip


def check(folder: Path, *words: object) -> subprocess.CompletedProcess[str]:
    """Run the check to its end."""
    return subprocess.run(
        command(*words), env=environment(folder), capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip


def table(folder: Path, **sections: Mapping[str, object]) -> Path:
    """Write a table of sections that need no GPU."""
    path = folder / "sections.json"
    path.write_text(
        json.dumps(
            [
                {"name": name, "parts": f"planted:{name.upper()}", "gpu": False, **fields}
                for name, fields in sections.items()
            ]
        )
    )
    return path


def written(folder: Path) -> Any:
    """Read what the check wrote."""
    return json.loads((folder / "gpu_check.json").read_text())


def test_without_a_gpu_it_is_one_sentence(tmp_path: Path) -> None:
    """It says why nothing is measured, writes nothing, and fails."""
    done = check(tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "gpu_check: torch sees no CUDA device here, so there is nothing to measure\n"
    )
    assert not (tmp_path / "gpu_check.json").exists()


def test_a_dry_run_says_what_would_run(tmp_path: Path) -> None:
    """Each section is named with what it lacks, without a GPU, and with exit code 0."""
    done = check(tmp_path, "--dry")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == [
        "device", "nvml", "capture", "threads", "served",
    ]  # fmt: skip
    assert any(line.startswith("not measured: ") for line in lines)
    only = check(tmp_path, "--list", "--only", "nvml")
    assert only.stdout.splitlines()[0].startswith("nvml ")


def test_a_section_that_there_is_not(tmp_path: Path) -> None:
    """It is named, with those that there are."""
    done = check(tmp_path, "--only", "device,gone")
    assert done.returncode == 2
    assert done.stderr.startswith("gpu_check: there is no section gone; there are device, nvml")


def test_every_section_leaves_figures_or_a_reason(tmp_path: Path) -> None:
    """A fault, an end and a missing module each stand in the file, beside what was measured."""
    sections = table(tmp_path, good={}, bad={}, ends={}, other={"needs": ["no_such_module"]})
    done = check(tmp_path, "--sections", sections)
    assert done.returncode == 1, done.stderr
    told = written(tmp_path)
    assert set(told) == {"date", "machine", "questions", "sections"}
    assert {"cores", "python", "torch", "driver", "why_no_gpu"} <= set(told["machine"])
    assert [one["number"] for one in told["questions"]] == list(range(1, 10))

    found = told["sections"]
    assert found["good"]["state"] == "done"
    assert found["good"]["figures"] == {"one": {"figure": 1.5}, "two": {"figure": 1.5}}
    assert found["bad"]["state"] == "failed"
    assert set(found["bad"]["figures"]) == {"first", "last"}
    assert found["bad"]["errors"]["fault"].endswith("ValueError: a planted fault")
    assert found["ends"]["why"] == "its process ended with 7, in ends"
    assert found["ends"]["figures"] == {"before": {"figure": 1.5}}
    assert found["other"] == {"state": "left out", "why": "no_such_module is not installed here"}
    assert "bad        failed" in done.stderr
    assert "other      left out" in done.stderr


def test_what_is_left_out_is_no_failure(tmp_path: Path) -> None:
    """Where all that could run did, the exit code is 0."""
    sections = table(tmp_path, good={}, other={"needs": ["no_such_module"]})
    done = check(tmp_path, "--sections", sections, "--out", tmp_path / "here.json")
    assert done.returncode == 0, done.stderr
    assert set(json.loads((tmp_path / "here.json").read_text())["sections"]) == {"good", "other"}


def test_a_section_over_its_limit_is_ended(tmp_path: Path) -> None:
    """Its process and that one's child are gone, its first part is kept, the next section runs."""
    sections = table(tmp_path, endless={"limit_s": 3}, good={})
    done = check(tmp_path, "--sections", sections)
    assert done.returncode == 1, done.stderr
    found = written(tmp_path)["sections"]
    assert found["endless"]["why"] == "over its limit of 3 s, and ended, in endless"
    assert found["endless"]["figures"] == {"before": {"figure": 1.5}}
    assert found["good"]["state"] == "done"
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids(tmp_path)))


def test_the_time_of_all_is_bounded(tmp_path: Path) -> None:
    """A section for which no time is left is not begun, and says so."""
    sections = table(tmp_path, good={})
    done = check(tmp_path, "--sections", sections, "--limit-s", "5")
    assert done.returncode == 1
    assert written(tmp_path)["sections"]["good"]["why"] == (
        "not begun: the time of all sections is over"
    )


def test_ended_early_it_keeps_what_was_measured(tmp_path: Path) -> None:
    """SIGTERM ends the section under way with the check, and the file holds those before."""
    sections = table(tmp_path, good={}, endless={})
    with subprocess.Popen(
        command("--sections", sections), env=environment(tmp_path), stderr=subprocess.DEVNULL
    ) as process:
        wait_until(lambda: (tmp_path / "pids").exists() or process.poll() is not None, 60)
        process.terminate()
        assert process.wait(20) == 1
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids(tmp_path)))
    assert set(written(tmp_path)["sections"]) == {"good"}


def pids(folder: Path) -> list[int]:
    """Return the processes of the endless section."""
    return [int(word) for word in (folder / "pids").read_text().split()]


@pytest.mark.parametrize("name", ["gpu_nvml", "gpu_threads", "gpu_served"])
def test_each_part_says_that_there_is_no_gpu(name: str, tmp_path: Path) -> None:
    """Run by itself it is one sentence, too."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / f"{name}.py")], env=environment(tmp_path),
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"{name}: ")
    assert done.stderr.endswith(", so there is nothing to measure\n")


def test_nvml_on_the_stand_in(tmp_path: Path) -> None:
    """Every part gives figures where the library answers; what it refuses is told."""
    stand_in = StandIn(compile_stand_in(tmp_path / "library"), tmp_path / "control")
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_nvml.py"), "--cpu"],
        env={**environment(tmp_path), **stand_in.environment()},
        capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["fields"][0]["value"] > 0
    assert told["buffers"]["power"]["period_ms"] == 50.0
    assert told["buffers"]["encoder"] == {"refused": "Invalid Argument", "code": 2}
    assert "nvmlDeviceGetSamples.power" in told["calls"]["busy"]["calls"]
    assert told["gpm"]["supported"]
    assert told["gpm"]["0.1 s"]["values"]["model_server.gpu.sm.active"]["median"] > 0
    assert set(told["effect"]) == {"off", "1 Hz", "10 Hz"}
    assert told["effect"]["10 Hz"]["polls"] > 0
    first, second = told["gpm_beside_capture"]["captures"]
    assert [one["failed"] for one in (first, second)] == ["", ""]
    assert min(one["kernels"] for one in (first, second)) > 0
    assert told["gpm_beside_capture"]["refused"] == 0


def test_served_by_threads(tmp_path: Path) -> None:
    """Batches come, and the agent ends with them."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_threads.py"), "--cpu"], env=environment(tmp_path),
        capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert 0 < told["batches"] <= told["requests"]
    assert told["device"] == "cpu"
    assert told["coverage"] == 0.0
