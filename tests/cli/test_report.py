"""`stagescope report`, as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagescope.cli import main
from stagescope.errors import EXIT_DONE, EXIT_USAGE
from stagescope.testing.runs import MS, client_row, server_row, write_run_folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Give a valid run folder."""
    client = [client_row(seq) for seq in range(120)]
    return write_run_folder(
        tmp_path, client, [server_row(row, {"inference": 5 * MS}) for row in client]
    )


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The table goes to standard output, without colour in a pipe."""
    assert main(["report", str(folder)]) == EXIT_DONE

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
