"""Files that are replaced whole."""

import os
from pathlib import Path

import pytest

from stagescope.files import replace_file


@pytest.mark.parametrize("by_folder", [True, False])
def test_a_file_is_replaced_and_no_link_followed(tmp_path: Path, by_folder: bool) -> None:
    """Links at the file's name and at that of its part are replaced, what they name stays."""
    precious, file = tmp_path / "precious", tmp_path / "file"
    precious.write_text("precious")
    file.symlink_to(precious)
    (tmp_path / ".file.part").symlink_to(precious)
    folder = os.open(tmp_path, os.O_RDONLY) if by_folder else None
    for content in ("old", b"new"):
        replace_file(Path("file") if by_folder else file, content, folder=folder)
    if folder is not None:
        os.close(folder)
    assert (file.read_text(), file.is_symlink(), file.stat().st_mode & 0o777) == (
        "new",
        False,
        0o600,
    )
    assert precious.read_text() == "precious"
    assert {one.name for one in tmp_path.iterdir()} == {"precious", "file"}


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    """A folder stands in its place: the error is raised, and no part stays."""
    (tmp_path / "file" / "within").mkdir(parents=True)
    with pytest.raises(OSError, match=r"file"):
        replace_file(tmp_path / "file", "new")
    assert {one.name for one in tmp_path.iterdir()} == {"file"}
