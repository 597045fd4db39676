"""Why something was started, kept with it: `captures/<id>/reason.json` in the spool."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = "captures"
NAME: Final = "reason.json"
MOST: Final = 100
"""Of reasons whose folder holds nothing else, the newest stay; a capture's files are not ours."""


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that a trigger started."""

    id: str
    """Of the capture; of a window of stacks, time and kind."""
    action: str
    """`stacks` or `kernels`."""
    kind: str
    """One of `notices.KINDS`."""
    pid: int
    service: str
    device: str
    noticed_ns: int
    """On the host's monotonic clock, like samples and stacks."""
    started_ns: int
    started_wall_ns: int
    """The same, since the Unix epoch."""
    seconds: float
    """How long it lasts; 0 where the capture ends by itself."""
    sentence: str


def keep_reason(spool: Path, reason: Reason) -> None:
    """Write it, whole or not at all; raises OSError."""
    folder = spool / FOLDER / reason.id
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden = folder / f".{NAME}"
    hidden.write_text(json.dumps(asdict(reason), indent=1) + "\n")
    os.replace(hidden, folder / NAME)
    _forget_old(spool / FOLDER)


def _forget_old(captures: Path) -> None:
    alone = [folder for folder in captures.iterdir() if _holds_a_reason_alone(folder)]
    for folder in sorted(alone, key=lambda one: one.stat().st_mtime)[:-MOST]:
        (folder / NAME).unlink(missing_ok=True)
        folder.rmdir()


def _holds_a_reason_alone(folder: Path) -> bool:
    return folder.is_dir() and [entry.name for entry in folder.iterdir()] == [NAME]
