"""The rooms are real folders at the root, seen by the package through one relative link each."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("agent", "analysis", "examples", "exporters", "loadgen", "middleware")


@pytest.mark.parametrize("room", ROOMS)
def test_room_link(room: str) -> None:
    """`src/stagescope/ROOM` is a link to the folder `ROOM` at the root of the checkout."""
    link = ROOT / "src" / "stagescope" / room
    assert link.is_symlink(), (
        f"src/stagescope/{room} is not a link: this checkout was made without symbolic links; "
        "clone again with `git clone -c core.symlinks=true`"
    )
    assert link.readlink() == Path("..", "..", room)
    assert (link / "__init__.py").is_file(), f"{room}/__init__.py is missing at the root"
