"""Writing a small file so that a reader sees the old one or the new one, never a part."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path


def replace_file(
    path: Path, content: str | bytes | memoryview, *, folder: int | None = None, mode: int = 0o600
) -> None:
    """Write *path*, whole or not at all. Raises OSError; then what was there before still is.

    *folder*: a descriptor of its folder, which is then not looked up by name again. No symbolic
    link is followed, neither one at *path* nor one that waits where the new file is made.
    """
    name = path.name if folder is not None else str(path)
    part = f".{path.name}.part" if folder is not None else str(path.with_name(f".{path.name}.part"))
    with suppress(FileNotFoundError):
        os.unlink(part, dir_fd=folder)  # of a process that was killed, or a link
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    fd = os.open(part, flags, mode, dir_fd=folder)
    try:
        with open(fd, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
        os.rename(part, name, src_dir_fd=folder, dst_dir_fd=folder)
    except BaseException:
        with suppress(OSError):
            os.unlink(part, dir_fd=folder)
        raise
