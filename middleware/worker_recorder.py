"""The recorder of a process that works for another one's requests: same spool, same service."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from stagescope.errors import StagescopeError
from stagescope.middleware.process import process_recorder
from stagescope.middleware.recorder import Recorder
from stagescope.recorder_reader import RecorderReader


def recorder_beside(carrier: str) -> Recorder | None:
    """Give this process's recorder, in the spool and for the service of *carrier*'s owner.

    None where there can be none, which is logged, or where the owner's file is gone.
    """
    path = carrier.split(";", 6)[-1]
    service = _service_of(path)
    return None if service is None else process_recorder(Path(path).parent, service)


@lru_cache(maxsize=64)
def _service_of(path: str) -> str | None:
    try:
        with RecorderReader(Path(path)) as owner:
            return owner.process.service
    except (OSError, StagescopeError):
        return None
