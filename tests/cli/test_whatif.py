"""`stagescope whatif`, as a shell sees it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from stagescope.cli import main
from stagescope.errors import EXIT_DONE, EXIT_USAGE
from tests.support.queues import arrivals, services, thread_run


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the run of a server with two threads, 80 % busy."""
    return thread_run(tmp_path, arrivals(80, 400, 1), services(20, 0.3, 400, 1), 2)


def test_text(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A line a change, below what was measured and how the simulation shows that."""
    assert main(["whatif", str(folder), "threads=3", "inference -20%"]) == EXIT_DONE

    out = capsys.readouterr().out
    for word in ("measured", "simulated", "threads=3", "inference -20%", "nine of ten"):
        assert word in out
    assert max(map(len, out.splitlines()[:8])) <= 100


def test_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON has each figure with its interval."""
    assert main(["whatif", str(folder), "threads=3", "--format", "json"]) == EXIT_DONE

    found = json.loads(capsys.readouterr().out)
    assert found["agrees"]
    (one,) = found["predictions"]
    assert one["change"] == "threads=3"
    assert one["p99_ms"]["low"] <= one["p99_ms"]["value"] <= one["p99_ms"]["high"]
    assert one["p99_ms"]["value"] < found["measured"]["p99_ms"]


def test_a_bad_change_and_a_folder_that_is_none(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One sentence each on standard error."""
    assert main(["whatif", str(folder), "quicker"]) == EXIT_USAGE
    assert capsys.readouterr().err.count("\n") == 1
    assert main(["whatif", str(tmp_path / "nowhere"), "threads=3"]) == EXIT_USAGE
    assert "no run.json" in capsys.readouterr().err
