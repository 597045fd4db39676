"""Why something was started: `triggers/ID.json` in the spool, and beside the capture's own files."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = "triggers"
SUFFIX: Final = ".json"
MOST: Final = 100
"""The newest so many reasons stay."""
CAPTURES: Final = "captures"
BESIDE: Final = "reason.json"
"""In the folder of a kernel capture, for as long as that stays."""
KERNELS: Final = "kernels"


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
    text = json.dumps(asdict(reason), indent=1) + "\n"
    _write(spool / FOLDER / f"{reason.id}{SUFFIX}", text)
    if reason.action == KERNELS:
        _write(spool / CAPTURES / reason.id / BESIDE, text)
    kept = sorted((spool / FOLDER).glob(f"*{SUFFIX}"), key=lambda one: one.stat().st_mtime_ns)
    for old in kept[:-MOST]:
        old.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    hidden = path.with_name(f".{path.name}.new")
    hidden.write_text(text)
    os.replace(hidden, path)
