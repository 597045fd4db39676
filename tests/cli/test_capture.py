"""`stagescope capture` as people use it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope.agent.kernels.rows import ROWS_NAME, read_rows
from stagescope.cli.capture import find_target
from stagescope.errors import UsageError
from stagescope.recorder.spool import SPOOL_VARIABLE
from stagescope.testing import wait_until
from tests.support.rings import RingWriter
from tests.support.torch_served import TorchServed, torch_served


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TorchServed]:
    """A real server under load, for all tests of this module."""
    with torch_served(tmp_path_factory.mktemp("served")) as server, server.load():
        yield server


def command(served: TorchServed, folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start `stagescope capture` in *folder*, on the server's spool."""
    return subprocess.Popen(
        [sys.executable, "-m", "stagescope", "capture", *words], cwd=folder, text=True,
        env=os.environ | {SPOOL_VARIABLE: str(served.spool)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finished(served: TorchServed, folder: Path, *words: str) -> tuple[int, str, str]:
    """Run it to its end; give exit code and both streams."""
    with command(served, folder, *words) as process:
        output, errors = process.communicate(timeout=60)
        return process.returncode, output, errors


def test_a_capture_is_a_table_and_a_trace(served: TorchServed, tmp_path: Path) -> None:
    """States on standard error, the table on standard output, the trace under captures/ID."""
    code, output, errors = finished(served, tmp_path, "--force")

    assert code == 0, errors
    told = [line.strip().partition(":")[0] for line in errors.splitlines() if "ERROR" not in line]
    assert list(dict.fromkeys(told)) == [
        f"process {served.process.pid} of torch-server", "armed", "warming", "recording",
        "stopping, and writing the trace",
    ]  # fmt: skip
    assert "\ninference " in output
    assert "aten::mkldnn_convolution" in output
    assert "requests are marked profiled" in output
    (trace,) = tmp_path.glob("captures/*/trace.json*")
    assert f"{trace.relative_to(tmp_path)}: open it at https://ui.perfetto.dev" in output
    assert all(len(line) <= 120 for line in output.splitlines())
    kept = read_rows(served.spool / "captures" / trace.parent.name / ROWS_NAME)
    assert {row.stage for row in kept.rows} >= {"inference", "batch.collate"}
    assert os.listdir(served.spool / "captures" / trace.parent.name) == [ROWS_NAME]


def test_machines_get_json(served: TorchServed, tmp_path: Path) -> None:
    """All rows, all facts, where the trace is; nothing else on standard output."""
    words = ("--force", "--format", "json", "--out", "here", "--pid", str(served.process.pid))
    code, output, errors = finished(served, tmp_path, *words)
    told = json.loads(output)

    assert (code, told["state"], told["pid"]) == (0, "exported", served.process.pid), errors
    assert told["trace"] == "here/trace.json"
    assert {row["kind"] for row in told["rows"]} == {"stage", "operator"}


def test_interrupted_it_keeps_what_it_has(served: TorchServed, tmp_path: Path) -> None:
    """Ctrl-C ends the recording, writes the trace and prints the table."""
    words = ("--force", "--batches", "10000", "--seconds", "60", "--max-events", "1000000")
    with command(served, tmp_path, *words) as process:
        assert process.stderr
        for line in process.stderr:
            if " of 10000 batches" in line and ": 0 of" not in line:
                process.send_signal(signal.SIGINT)
                break
        output, errors = process.communicate(timeout=60)

    assert process.returncode == 0, errors
    assert "enough: keeping what there is" in errors
    assert "inference" in output
    assert list(tmp_path.glob("captures/*/trace.json*"))


def test_killed_it_leaves_no_profiler(served: TorchServed, tmp_path: Path) -> None:
    """After SIGKILL of the command the server goes on, and the next capture works."""
    words = ("--force", "--batches", "10000", "--seconds", "60", "--max-events", "1000000")
    with command(served, tmp_path, *words) as process:
        assert process.stderr
        assert any("recording" in line for line in process.stderr)
        process.kill()
        process.communicate()

    wait_until(lambda: finished(served, tmp_path, "--force")[0] == 0, 30)


def test_a_moment_after_another_it_is_refused(served: TorchServed, tmp_path: Path) -> None:
    """Exit code 3, one sentence, and no empty folder."""
    assert finished(served, tmp_path, "--force", "--out", str(tmp_path / "first"))[0] == 0
    code, output, errors = finished(served, tmp_path)

    assert (code, output) == (3, "")
    assert "was captured a moment ago" in errors.splitlines()[-1]
    assert not list(tmp_path.glob("captures/*"))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--pid", "4194305"), "there is no process 4194305 here"),
        (("--service", "nobody"), "no live process of service nobody records in"),
        (("--batches", "0"), "--batches 0: above 0, at most 10,000"),
        (("--out", "/proc/nowhere"), "--out /proc/nowhere cannot be written"),
    ],
)
def test_bad_input_is_one_sentence(
    served: TorchServed, tmp_path: Path, words: tuple[str, ...], sentence: str
) -> None:
    """Exit code 2, and nothing was started."""
    code, output, errors = finished(served, tmp_path, *words)

    assert (code, output) == (2, "")
    (line,) = errors.splitlines()
    assert line.startswith("stagescope capture: ")
    assert sentence in line


def test_the_busiest_process_of_a_service_is_taken(tmp_path: Path) -> None:
    """By requests in flight; with several services one must be named."""
    quiet = RingWriter(tmp_path / "a.ring", service="resnet")
    busy = RingWriter(tmp_path / "b.ring", service="resnet")
    other = RingWriter(tmp_path / "c.ring", service="bert")
    with quiet, busy, other:
        busy.begin(0)
        found = find_target(tmp_path, None, "resnet")
        assert (found.ring, found.in_flight) == (busy.path, 1)
        assert find_target(tmp_path, None, "bert").ring == other.path
        with pytest.raises(UsageError, match="name one of bert, resnet with --service"):
            find_target(tmp_path, None, None)
    with pytest.raises(UsageError, match="no live process records in"):
        find_target(tmp_path, None, None)


def test_why_a_pid_cannot_be_captured(tmp_path: Path) -> None:
    """No Python, another spool, and a Python process that records nothing at all."""
    with subprocess.Popen(["sleep", "60"]) as sleeping:
        with pytest.raises(UsageError, match=rf"{sleeping.pid} \(sleep\) is no Python process"):
            find_target(tmp_path, sleeping.pid, None)
        sleeping.kill()
    with subprocess.Popen(
        [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=os.environ | {SPOOL_VARIABLE: "/elsewhere"},
    ) as python:  # fmt: skip
        assert python.stdin
        assert python.stdout
        python.stdout.readline()
        with pytest.raises(UsageError, match="records in /elsewhere, not in"):
            find_target(tmp_path, python.pid, None)
        with pytest.raises(UsageError, match="records nothing in /elsewhere"):
            find_target(Path("/elsewhere"), python.pid, None)
        python.stdin.close()


def test_a_process_of_another_namespace_is_found_by_its_own_pid(tmp_path: Path) -> None:
    """Its recorder file has the pid that it has in its container; here it is our own process."""
    with RingWriter(tmp_path / "a.ring") as ring:
        assert find_target(tmp_path, os.getpid(), None).ring == ring.path
