"""`stagescope report`, as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagescope.cli import main
from stagescope.errors import EXIT_DONE, EXIT_USAGE
from tests.support.runs import MS, client_row, server_row, write_run_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a valid run folder."""
    client = [client_row(seq) for seq in range(120)]
    return write_run_folder(
        tmp_path, client, [server_row(row, {"inference": 5 * MS}) for row in client]
    )


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With --full the table goes to standard output too, without colour in a pipe."""
    assert main(["report", str(folder), "--full"]) == EXIT_DONE

    out = capsys.readouterr().out
    assert "client latency   20.000" in out
    assert "\x1b" not in out


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON is the whole output, and holds the keys of the schema."""
    assert main(["report", str(folder), "--format", "json"]) == EXIT_DONE

    found = json.loads(capsys.readouterr().out)
    assert found["valid"]
    assert found["stages"][3]["stage"] == "inference"


def test_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """An INVALID run is printed, and its exit code is 2."""
    assert main(["report", str(write_run_folder(tmp_path, [client_row(0)]))]) == EXIT_USAGE

    assert capsys.readouterr().out.startswith("INVALID")


def test_no_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is no run folder is one sentence on standard error."""
    assert main(["report", str(tmp_path / "nowhere")]) == EXIT_USAGE

    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert "no run.json" in captured.err


def test_two_runs_stand_side_by_side(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two folders give one table with a column pair each; their JSON is a list of two."""
    client = [client_row(seq) for seq in range(120)]
    second = write_run_folder(
        tmp_path / "second", client, [server_row(row, {"inference": 9 * MS}) for row in client]
    )

    assert main(["report", str(folder), str(second)]) == EXIT_DONE
    out = capsys.readouterr().out
    assert "inference grew most" in out

    assert main(["report", str(folder), str(second), "--format", "json"]) == EXIT_DONE
    means = [run["stages"][3]["mean_ms"] for run in json.loads(capsys.readouterr().out)]
    assert means == [5.0, 9.0]


def test_a_stage_that_nobody_recorded_is_unknown(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stage without a mark is a dash with a footnote, and null in JSON: never 0."""
    assert main(["report", str(folder), "--full"]) == EXIT_DONE
    out = capsys.readouterr().out
    (batch,) = (line for line in out.splitlines() if line.startswith("batch "))
    assert "0.000" not in batch
    assert "unknown: no mark or hook recorded queue, preprocess, batch" in out

    assert main(["report", str(folder), "--format", "json"]) == EXIT_DONE
    stages = {one["stage"]: one for one in json.loads(capsys.readouterr().out)["stages"]}
    assert (stages["batch"]["recorded"], stages["batch"]["mean_ms"]) == (False, None)
    assert stages["inference"]["recorded"]
