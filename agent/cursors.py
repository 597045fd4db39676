"""Where an agent that comes next goes on: one small file for the whole spool."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

FILE_NAME = "agent.cursors"

_log = logging.getLogger("stagescope")


@dataclass(frozen=True, slots=True)
class Cursor:
    """A place in one recorder file: see RecorderReader's `next_seq` and `chains_from`."""

    next_seq: int
    chains_from: int


Cursors = dict[str, Cursor]
"""By ring id."""


def load_cursors(spool: Path) -> Cursors:
    """Read what the last agent saved; empty where there was none.

    A file that cannot be understood is put aside and said: rather records twice than none.
    """
    path = spool / FILE_NAME
    try:
        saved = json.loads(path.read_bytes())
        return {ring: Cursor(int(place[0]), int(place[1])) for ring, place in saved.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, IndexError, KeyError, AttributeError) as problem:
        aside = path.with_suffix(".broken")
        path.replace(aside)
        _log.warning(
            "cursor file %s cannot be read (%s): every recorder file is read again from its "
            "start, the file is kept as %s", path, problem, aside.name,
        )  # fmt: skip
        return {}


def save_cursors(spool: Path, cursors: Cursors) -> None:
    """Replace the file at once, so that a reader sees the old or the new; raises OSError."""
    path = spool / FILE_NAME
    hidden = path.with_suffix(".new")
    text = json.dumps({ring: [at.next_seq, at.chains_from] for ring, at in cursors.items()})
    fd = os.open(hidden, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "w") as file:
        file.write(text)
    hidden.replace(path)
