"""`stagescope demo`, as a person runs it, with a small model and short runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from stagescope.cli import main
from stagescope.runfolder.run import read_run
from stagescope.stages import STAGES

SOURCE = str(Path(__file__).parents[2] / "src")
SMALL = {"IMAGE_SERVER_IMAGE_SIDE": "96", "PYTHONPATH": SOURCE}


@contextmanager
def demo(out: Path, seconds: float) -> Iterator[subprocess.Popen[str]]:
    """Run the demo as a process of its own."""
    command = [sys.executable, "-m", "stagescope", "demo", "--seconds", str(seconds)]
    with subprocess.Popen(
        [*command, "--out", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | SMALL,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def test_three_rates_give_three_joined_runs_and_a_table(tmp_path: Path) -> None:
    """The demo exits 0, prints each rate and stage, and leaves three run folders."""
    from stagescope.analysis.build import build_report

    with demo(tmp_path / "out", seconds=2) as process:
        said, told = process.communicate(timeout=100)

    assert process.returncode == 0, told
    for name in ("low", "middle", "over"):
        report = build_report(tmp_path / "out" / name)
        assert report.unmatched.client.total == 0
        assert report.unmatched.server == 0
        assert {part.name for part in report.stages if part.mean_ms > 0} >= set(STAGES)
        assert report.batches.count > 0
        network = report.part("network")
        assert network is not None
        assert network.mean_ms >= 0
        assert name in said
    for stage in STAGES:
        assert stage in said
    assert (tmp_path / "out" / "image.jpg").read_bytes()[:2] == b"\xff\xd8"


def test_ctrl_c_keeps_what_was_measured_and_leaves_no_server(tmp_path: Path) -> None:
    """Ctrl-C at the second run: exit code 130, the first run kept and shown, no server left."""
    out = tmp_path / "out"
    with demo(out, seconds=2) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        for line in process.stderr:
            if "run 2 of 3" in line:
                break
        process.send_signal(signal.SIGINT)
        told = process.stderr.read()
        said = process.stdout.read()
        code = process.wait(60)

    assert code == 130, told
    assert "interrupted" in told
    assert "low" in said
    assert not read_run(out / "low").interrupted
    # Whether the driver had begun by then is a matter of milliseconds.
    assert not (out / "middle").exists() or read_run(out / "middle").interrupted
    assert not (out / "over").exists()
    assert "Finished server process" in (out / "server.log").read_text()


def test_torch_is_the_users_own(tmp_path: Path) -> None:
    """`--server torch` without torch says what to install, before it makes or starts anything."""
    hidden = (
        "import importlib.util as util, sys; find = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "from stagescope.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", hidden, "demo", "--server", "torch", "--out", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": SOURCE},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "pip install torch" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_used_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is already there is not overwritten; the sentence names the folder."""
    (tmp_path / "kept").write_text("mine")

    assert main(["demo", "--out", str(tmp_path)]) == 2
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["kept"]


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "1e9"])
def test_a_senseless_length_is_refused(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of no or of endless length is wrong usage."""
    assert main(["demo", "--seconds", seconds]) == 2
    assert "from 1 to 3600" in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path: Path) -> None:
    """Without ONNX Runtime the demo says what to install, before it makes or starts anything."""
    (tmp_path / "onnxruntime.py").write_text(
        "raise ModuleNotFoundError('no runtime', name='onnxruntime')\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "stagescope", "demo", "--out", str(tmp_path / "out")],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), SOURCE])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 2
    assert "pip install 'stagescope[demo]'" in done.stderr
    assert not (tmp_path / "out").exists()
