"""What a capture asks for, and the folder that it leaves in the spool."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stagescope.middleware.probe import Refused

FOLDER = "captures"
TRACE_NAME = "torch.json"
LEDGER_NAME = "ledger.json"
_ID = re.compile(r"[A-Za-z0-9-]{1,64}")
BYTES_AN_EVENT = 320
"""Of torch's JSON, about."""


@dataclass(frozen=True, slots=True)
class Asked:
    """The question of a capture."""

    capture_id: str
    batches: int = 3
    seconds: float = 10.0
    """How long to wait for traffic, and how long to record, at most each."""
    max_events: int = 20_000
    deep: bool = False
    """Operators too where there is a device; without one there are only operators."""
    force: bool = False
    """Also right after another capture of this process."""
    device_only: bool = False
    """Not where there are only operators to be had."""
    background: bool = False
    """One of an agent's duty cycle: it keeps its own pace, and takes no turn from people."""

    @classmethod
    def read(cls, question: Mapping[str, Any]) -> Asked:
        """Take *question* apart. Raises Refused where a value is not usable."""
        fields: dict[str, Any] = {
            name: question[name] for name in cls.__dataclass_fields__ if name in question
        }
        capture_id = fields.get("capture_id")
        if not isinstance(capture_id, str) or not _ID.fullmatch(capture_id):
            raise Refused(f"a capture's id has letters, digits and dashes, not {capture_id!r}")
        asked = cls(**fields)
        for name, most in (("batches", 10_000), ("seconds", 600), ("max_events", 1_000_000)):
            value = getattr(asked, name)
            if not isinstance(value, int | float) or not 0 < value <= most:
                raise Refused(f"{name} of a capture is a number above 0, at most {most}: {value!r}")
        return asked


class Folder:
    """Where a capture's files come to lie: `captures/ID` in the spool of the process."""

    def __init__(self, spool: Path, asked: Asked) -> None:
        """Make it. Raises OSError where it cannot be, or the disk has no room for the trace."""
        self.path = spool / FOLDER / asked.capture_id
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.part = self.path / f"{TRACE_NAME}.part"
        room = os.statvfs(self.path)
        need, free = asked.max_events * BYTES_AN_EVENT, room.f_bavail * room.f_frsize
        if free < need:
            self.remove()
            raise OSError(
                28, f"the trace may need {need / 1e6:.0f} MB and {free / 1e6:.0f} MB are free",
                str(spool),
            )  # fmt: skip

    def finish(self, ledger: Mapping[str, Any]) -> None:
        """Write the ledger, and give the trace its name. Raises OSError."""
        (self.path / LEDGER_NAME).write_text(json.dumps(ledger), "utf-8")
        self.part.rename(self.path / TRACE_NAME)

    def remove(self) -> None:
        """Leave nothing of ours; who asked may have put something there already."""
        for file in (self.part, self.path / TRACE_NAME, self.path / LEDGER_NAME):
            file.unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()


@contextmanager
def folder_of(spool: Path, asked: Asked) -> Iterator[Folder]:
    """Give the folder; it goes again with whatever is raised inside."""
    folder = Folder(spool, asked)
    try:
        yield folder
    except BaseException:
        folder.remove()
        raise
