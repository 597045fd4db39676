"""The one place where a fault of ours is caught: counted, logged once, never the served app's."""

from __future__ import annotations

import logging
from types import TracebackType
from typing import Protocol
from weakref import WeakSet

from stagescope import settings

log = logging.getLogger("stagescope")


_said: set[str] = set()


class Counting(Protocol):
    """A recorder, as far as faults go."""

    def count(self, counter: str) -> None:
        """Add one to the file's counter of that name."""


recorders: WeakSet[Counting] = WeakSet()
"""Those of this process: one of them counts a fault whose place knows none."""


class guarded:
    """Keep what goes wrong inside from the caller; *recorder* counts it where there is one."""

    __slots__ = ("_recorder",)

    def __init__(self, recorder: Counting | None = None) -> None:
        self._recorder = recorder

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is None or not isinstance(error, Exception):
            return False
        return not fault(error, self._recorder)


def say_once(sentence: str, *, kind: str = "") -> None:
    """Log what the user should know, the first time only; once for all of a *kind*, where given."""
    key = kind or sentence
    if key not in _said:
        _said.add(key)
        log.warning("stagescope: %s", sentence)


def fault(error: Exception, recorder: Counting | None) -> bool:
    """Count and say a fault of ours; True where it is to be raised again (under tests)."""
    if getattr(recorder, "abandoned", False):
        return False  # A forked child's view of its parent's file, or of one that was cut off.
    where = type(error).__name__
    if where not in _said:
        _said.add(where)
        log.warning(
            "stagescope: a fault of its own, logged once; the server goes on", exc_info=error
        )
    for counting in [recorder] if recorder is not None else list(recorders)[:1]:
        try:
            counting.count("faults")
        except ValueError:
            return False  # The file is a forked parent's; there is nowhere to count.
    try:
        return settings.RAISE.on()
    except Exception:  # noqa: BLE001 - no guard stands above this one
        return False
