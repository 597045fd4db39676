"""The spool: where it is, who may use it, and who holds a file in it."""

import os
import stat
from pathlib import Path

import pytest

from stagescope.errors import StagescopeError
from stagescope.recorder.spool import (
    SPOOL_VARIABLE,
    default_spool,
    ensure_spool,
    ring_files,
    try_lock,
)


def test_the_environment_names_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`STAGESCOPE_SPOOL` comes first, then the user's runtime folder, then shared memory."""
    monkeypatch.setenv(SPOOL_VARIABLE, str(tmp_path / "named"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "runtime"))
    assert default_spool() == tmp_path / "named"

    monkeypatch.delenv(SPOOL_VARIABLE)
    assert default_spool() == tmp_path / "runtime" / "stagescope"

    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert default_spool().name == f"stagescope-{os.getuid()}"


def test_a_missing_spool_is_made_for_its_owner_alone(tmp_path: Path) -> None:
    """Made with its parents, 0700; a second call finds it there."""
    spool = tmp_path / "a" / "spool"

    assert ensure_spool(spool) == ensure_spool(spool) == spool
    assert stat.S_IMODE(spool.stat().st_mode) == 0o700


@pytest.mark.parametrize(
    ("name", "cause"),
    [("file", "is a file; name a folder"), ("file/below", "Not a directory")],
)
def test_a_file_in_the_way_is_said(name: str, cause: str, tmp_path: Path) -> None:
    """One sentence names the spool and the cause."""
    (tmp_path / "file").touch()

    with pytest.raises(StagescopeError, match=cause) as told:
        ensure_spool(tmp_path / name)
    assert str(tmp_path / name) in str(told.value)


def test_a_spool_that_cannot_be_made_is_said() -> None:
    """A file system that takes no folders, as root finds one in /proc, is named with the cause."""
    with pytest.raises(StagescopeError, match="spool /proc/stagescope cannot be made: No such"):
        ensure_spool(Path("/proc/stagescope"))


def test_ring_files_come_oldest_first(tmp_path: Path) -> None:
    """Files of other names, and files that are being made, are passed over."""
    for age, name in enumerate(["c.ring", "a.ring", "b.ring", "x.part", "agent.lock"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))

    assert [path.name for path in ring_files(tmp_path)] == ["c.ring", "a.ring", "b.ring"]
    assert ring_files(tmp_path / "none") == []


def test_a_lock_has_one_holder(tmp_path: Path) -> None:
    """Another open of the same file gets it when the first is closed, shared holders together."""
    path = tmp_path / "lock"
    path.touch()
    first, second, third = (os.open(path, os.O_RDONLY) for _ in range(3))
    try:
        assert try_lock(first)
        assert not try_lock(second)
        assert not try_lock(second, shared=True)
        os.close(first)
        assert try_lock(second, shared=True)
        assert try_lock(third, shared=True)
        assert not try_lock(third)
    finally:
        os.close(second)
        os.close(third)
