"""The folder that a capture leaves in the spool, or does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from stagescope.kernels import CaptureRequest
from stagescope.middleware.torch.profiler import FOLDER, LEDGER_NAME, TRACE_NAME, folder_of


def test_a_disk_without_room_is_told_before_anything_starts(tmp_path: Path) -> None:
    """How much the trace may need, how much there is, and no folder stays."""
    asked = CaptureRequest(capture_id="x", max_events=10**15)
    with (
        pytest.raises(OSError, match=r"may need 320000000000 MB and \d+ MB are free") as told,
        folder_of(tmp_path, asked),
    ):
        raise AssertionError("never inside")

    assert told.value.filename == str(tmp_path)
    assert list((tmp_path / FOLDER).iterdir()) == []


def test_files_have_their_names_once_they_are_whole(tmp_path: Path) -> None:
    """The trace last; whatever goes wrong before, nothing stays."""
    with folder_of(tmp_path, CaptureRequest(capture_id="x")) as folder:
        folder.part.write_text("{}")
        folder.finish({"a": 1})
        assert sorted(file.name for file in folder.path.iterdir()) == [LEDGER_NAME, TRACE_NAME]
    with pytest.raises(RuntimeError), folder_of(tmp_path, CaptureRequest(capture_id="y")) as folder:
        folder.part.write_text("{")
        raise RuntimeError
    assert [each.name for each in (tmp_path / FOLDER).iterdir()] == ["x"]
