"""The spool: where it is, who may use it, and who holds a file in it."""

import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from stagescope.errors import StagescopeError
from stagescope.recorder.format import IN_FLIGHT_SLOTS, file_bytes
from stagescope.recorder.spool import (
    SPOOL_VARIABLE,
    affordable_ring_slots,
    default_spool,
    default_spools,
    ensure_spool,
    open_own,
    opened_spool,
    ring_files,
    try_lock,
)


def test_the_environment_names_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`STAGESCOPE_SPOOL` comes first; else shells and services of one user agree on one folder."""
    monkeypatch.setenv(SPOOL_VARIABLE, str(tmp_path / "named"))
    assert default_spool() == tmp_path / "named"

    monkeypatch.delenv(SPOOL_VARIABLE)
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    without = default_spool()
    assert without == Path(f"/dev/shm/stagescope-{os.geteuid()}")

    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_spool() == without
    assert tmp_path / "stagescope" in default_spools()
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/proc/nothing/here")
    assert default_spool() == without


@pytest.mark.parametrize("prepared", ["folder of another user", "link", "open to all"])
def test_a_default_spool_that_others_prepared_is_not_used(prepared: str, tmp_path: Path) -> None:
    """In /dev/shm anybody can take the name first: the next choice is used, and nothing followed."""
    uid = 61_000 + os.getpid() % 4000
    taken = Path(f"/dev/shm/stagescope-{uid}")
    try:
        if prepared == "link":
            (tmp_path / "target").mkdir(mode=0o777)
            taken.symlink_to(tmp_path / "target")
        else:
            taken.mkdir()
            taken.chmod(0o777)
        if prepared == "open to all":
            os.chown(taken, uid, uid)

        found = as_user(
            uid,
            "from stagescope.recorder.spool import *; print(default_spool())",
            "XDG_RUNTIME_DIR",
        )
        assert found == f"{tempfile.gettempdir()}/stagescope-{uid}"
        said = as_user(
            uid,
            "from pathlib import Path; from stagescope.recorder.spool import *\n"
            f"try: ensure_spool(Path({str(taken)!r}))\n"
            "except Exception as problem: print(problem)",
        )
        assert str(taken) in said
        assert any(
            why in said for why in ("belongs to uid", "symbolic link", "may be written by others")
        )
    finally:
        if taken.is_symlink():
            taken.unlink()
        else:
            taken.rmdir()


def as_user(uid: int, code: str, *unset: str) -> str:
    """Run *code* in a Python process of another user; give what it prints."""
    environment = {name: value for name, value in os.environ.items() if name not in unset}
    environment.pop(SPOOL_VARIABLE, None)
    code = f"import sys; sys.path[:] = {sys.path!r}\n{code}"
    # The modules are read as root; what they do is done as the other user.
    code = code.replace("\n", f"\nimport os, stagescope.recorder.spool; os.setuid({uid})\n", 1)
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def test_another_users_folder_is_refused_also_by_root(tmp_path: Path) -> None:
    """The owner decides what is in it; a folder that is meant for all may be shared by name."""
    spool = tmp_path / "spool"
    spool.mkdir(mode=0o755)
    os.chown(spool, 61_000, 61_000)
    with pytest.raises(
        StagescopeError, match=r"belongs to uid 61000, not to you .*sudo -u '#61000'"
    ):
        ensure_spool(spool)

    spool.chmod(0o777)
    assert ensure_spool(spool) == spool


def test_links_and_second_names_are_never_written(tmp_path: Path) -> None:
    """A file that somebody else chose stays as it is: a link, a hard link, a pipe, a folder."""
    precious = tmp_path / "precious"
    precious.write_text("precious")
    spool = tmp_path / "spool"
    spool.mkdir()
    (spool / "link").symlink_to(precious)
    (spool / "name").hardlink_to(precious)
    os.mkfifo(spool / "pipe")
    (spool / "folder").mkdir()

    with opened_spool(spool) as folder:
        for name in ("link", "name", "pipe", "folder"):
            with pytest.raises(OSError):  # noqa: PT011 - which one differs
                os.close(open_own(folder, name, os.O_RDWR))
        os.close(open_own(folder, "new", os.O_RDWR))

    assert precious.read_text() == "precious"
    assert stat.S_IMODE((spool / "new").stat().st_mode) == 0o600


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


@pytest.mark.parametrize(
    ("whole_mb", "free_mb", "slots"),
    [
        (16_000, 16_000, 8192),
        (16_000, 143, 8192),
        (16_000, 100, 4096),
        (16_000, 60, 0),  # The last 64 MB are left to others.
        (64, 64, 2048),  # Docker's /dev/shm.
        (64, 40, 1024),
        (64, 16, 0),
        (0, 0, 8192),  # A file system that tells no size.
    ],
)
def test_a_file_is_as_large_as_there_is_room(whole_mb: int, free_mb: int, slots: int) -> None:
    """At most a sixteenth of what is free, and never from what others are left."""
    blocks, free = whole_mb * 256, free_mb * 256
    found = os.statvfs_result((4096, 4096, blocks, free, free, 0, 0, 0, 0, 255))

    assert affordable_ring_slots(found) == slots


def test_forty_workers_leave_room_in_a_small_file_system() -> None:
    """In Docker's 64 MB of shared memory an app still gets a quarter, however many workers."""
    free = 64 << 20
    files = 0
    while slots := affordable_ring_slots(
        os.statvfs_result((4096, 4096, 16_384, free >> 12, free >> 12, 0, 0, 0, 0, 255))
    ):
        free -= file_bytes(IN_FLIGHT_SLOTS, slots)
        files += 1

    assert free >= 16 << 20
    assert files >= 24


def test_ring_files_come_oldest_first(tmp_path: Path) -> None:
    """Other names, files that are being made, and what is no regular file are passed over."""
    for age, name in enumerate(["c.ring", "a.ring", "b.ring", "x.part", "agent.lock"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (age, age))
    (tmp_path / "loop.ring").symlink_to(tmp_path / "loop.ring")
    (tmp_path / "link.ring").symlink_to(tmp_path / "a.ring")
    (tmp_path / "folder.ring").mkdir()
    os.mkfifo(tmp_path / "pipe.ring")

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


def test_without_any_folder_to_write_a_default_is_named_all_the_same() -> None:
    """A read-only host has no temporary folder either: asking for the default raises nothing."""
    code = (
        "import tempfile; from stagescope.recorder.spool import default_spools\n"
        "tempfile._candidate_tempdir_list = lambda: ['/proc/nothing']\n"
        "print(*default_spools())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )

    assert done.stdout.split()[-1] == f"/tmp/stagescope-{os.geteuid()}"
