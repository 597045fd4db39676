"""What is read of processes in /proc."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stagescope.proc import open_files, parent_pid


def test_the_parent_of_a_process_of_any_name(tmp_path: Path) -> None:
    """A name may hold spaces and brackets; what is gone or no process has none."""
    assert parent_pid(Path("/proc/self")) == os.getppid()
    (tmp_path / "stat").write_bytes(b"42 (a) S 7 (x) R 9 1 1")
    assert parent_pid(tmp_path) == 9
    (tmp_path / "stat").write_bytes(b"42 (a")
    assert parent_pid(tmp_path) == 0
    assert parent_pid(tmp_path / "none") == 0


def test_the_files_that_a_process_holds_open(tmp_path: Path) -> None:
    """Each by its descriptor; of a process that is gone it is an OSError."""
    with (tmp_path / "held").open("wb") as held:
        assert dict(open_files(Path("/proc/self")))[str(held.fileno())] == held.name
    with pytest.raises(OSError, match="none"):
        list(open_files(tmp_path / "none"))
