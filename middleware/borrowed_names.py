"""Stage names of this process in another's recorder file: the same name may have another code there.

A file's table has two parts: its owner fills it from the front, and processes that write into a
lent slot of it from the back, one at a time under a lock of the file's bytes (a record lock,
which has nothing to do with the owner's sign of life).
"""

from __future__ import annotations

import fcntl
import os
from threading import Lock

from stagescope import recorder_format as fmt
from stagescope.middleware import names
from stagescope.stages import KNOWN

_lock = Lock()


def _fresh_lock_in_child() -> None:
    """A thread that the fork did not take along may hold the parent's."""
    global _lock
    _lock = Lock()


os.register_at_fork(after_in_child=_fresh_lock_in_child)


class BorrowedNames:
    """The table of names in the file at *path*, mapped for writing as *memory*."""

    def __init__(self, path: str, memory: memoryview) -> None:
        self._path = path
        self._memory = memory
        self._codes: dict[int, int] = {}

    def code(self, own: int) -> int:
        """Give the code in that file for the code *own* of this process; `other` when it is full."""
        if own <= len(KNOWN) or own >= fmt.CODE_SPECIAL:
            return own
        code = self._codes.get(own)
        if code is None:
            code = self._codes[own] = self._find_or_add(_name(own))
        return code

    def _find_or_add(self, name: bytes) -> int:
        front = range(1, fmt.NAME_CAPACITY - fmt.BORROWED_NAMES + 1)
        for code in front:
            found = self._read(code)
            if found == name:
                return code
            if not found:
                break
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with _lock:
                fcntl.lockf(fd, fcntl.LOCK_EX, fmt.NAME_CAPACITY * fmt.NAME_BYTES, fmt.NAMES_AT)
                return self._find_or_add_behind(name)
        finally:
            os.close(fd)  # which unlocks

    def _find_or_add_behind(self, name: bytes) -> int:
        first = fmt.NAME_CAPACITY - fmt.BORROWED_NAMES
        for code in range(fmt.NAME_CAPACITY, first, -1):
            found = self._read(code)
            if not found:
                at = fmt.NAMES_AT + (code - 1) * fmt.NAME_BYTES
                self._memory[at + 1 : at + 1 + len(name)] = name
                self._memory[at] = len(name)  # Last, so that a reader sees it whole.
                return code
            if found == name:
                return code
        return fmt.CODE_OTHER

    def _read(self, code: int) -> bytes:
        at = fmt.NAMES_AT + (code - 1) * fmt.NAME_BYTES
        return bytes(self._memory[at + 1 : at + 1 + self._memory[at]])


def _name(code: int) -> bytes:
    for name, known in list(names.CODES.items()):
        if known == code:
            return names.encode(name)
    return b"other"


class BorrowedCodes:
    """A lent slot's codes, as far as a timeline uses them: written as the file's owner knows them."""

    __slots__ = ("_codes", "_names")

    def __init__(self, codes: memoryview, names: BorrowedNames) -> None:
        self._codes = codes
        self._names = names

    def __setitem__(self, index: int, code: int) -> None:
        self._codes[index] = self._names.code(code)
