"""Stage names of this process and their codes; every recorder file gets a copy of the table."""

from __future__ import annotations

import logging
import os
from threading import Lock
from typing import Protocol
from weakref import WeakSet

from stagescope import recorder_format as fmt
from stagescope.stages import KNOWN

log = logging.getLogger("stagescope")

CODES: dict[str, int] = {name: index + 1 for index, name in enumerate(KNOWN)}
"""Code by name: read without a lock, grows under one, never shrinks."""

MOST = fmt.NAME_CAPACITY - fmt.BORROWED_NAMES
"""Names that one process may use."""

lock = Lock()
_said: set[str] = set()


class NameTable(Protocol):
    """A recorder, as far as names go."""

    def write_name(self, code: int, encoded: bytes) -> None:
        """Put *encoded* (UTF-8, below 64 bytes) into the table under *code*."""

    def count_refused_name(self) -> None:
        """Count one name that was not taken."""


tables: WeakSet[NameTable] = WeakSet()


def encode(name: str) -> bytes:
    """Give *name* as the table holds it, whatever text it is."""
    return name.encode("utf-8", "replace")


def _fresh_lock_in_child() -> None:
    """A thread that the fork did not take along may hold the parent's."""
    global lock
    lock = Lock()


os.register_at_fork(after_in_child=_fresh_lock_in_child)


def intern(name: object) -> int:
    """Give the code of *name*, new or known; that of `other` for what cannot be a stage name.

    Refused are: what is not text, the empty text, more than 63 bytes of UTF-8, and every new
    name once the table is full. The first refusal of each kind is logged, all are counted.
    """
    if isinstance(name, str) and (known := CODES.get(name)):
        return known
    if not isinstance(name, str):
        return _refuse("type", f"a stage name must be text, not {type(name).__name__}")
    encoded = encode(name)
    if not 0 < len(encoded) < fmt.NAME_BYTES:
        return _refuse("length", f"a stage name must have 1 to 63 bytes, not {len(encoded)}")
    with lock:
        if name in CODES:
            return CODES[name]
        if len(CODES) >= MOST:
            return _refuse("many", f"this process uses more than {MOST} stage names; "
                                   f"{name!r} and further ones")  # fmt: skip
        code = len(CODES) + 1
        for table in list(tables):
            table.write_name(code, encoded)
        CODES[name] = code
    return code


def _refuse(kind: str, sentence: str) -> int:
    for table in list(tables):
        table.count_refused_name()
    if kind not in _said:
        _said.add(kind)
        log.warning("stagescope: %s: counted as `other`, said once", sentence)
    return fmt.CODE_OTHER
