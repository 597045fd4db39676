"""Stage names of this process and their codes; every recorder file gets a copy of the table."""

from __future__ import annotations

import fcntl
import os
from itertools import count
from threading import RLock
from typing import Protocol
from weakref import WeakSet

from stagescope.middleware.recording.guard import say_once
from stagescope.recorder import format as fmt
from stagescope.stages import KNOWN

CODES: dict[str, int] = {name: index + 1 for index, name in enumerate(KNOWN)}
"""Code by name: read without a lock, grows under one, never shrinks."""

MOST = fmt.NAME_CAPACITY - fmt.BORROWED_NAMES
"""Names that one process may use."""

lock = RLock()
"""Reentrant, as a signal handler may open a stage of a new name while this thread holds it."""
_next_code = count(len(CODES) + 1).__next__


class NameTable(Protocol):
    """A recorder, as far as names go."""

    def write_name(self, code: int, encoded: bytes) -> None:
        """Put *encoded* (UTF-8, below 64 bytes) into the table under *code*."""

    def count_refused_name(self) -> None:
        """Count one name that was not taken."""


tables: WeakSet[NameTable] = WeakSet()


def encode(name: str) -> bytes:
    """Return *name* as the table holds it, whatever text it is."""
    return name.encode("utf-8", "replace")


def _fresh_lock_in_child() -> None:
    """A thread that the fork did not take along may hold the parent's."""
    global lock
    lock = RLock()


os.register_at_fork(after_in_child=_fresh_lock_in_child)


def intern(name: object) -> int:
    """Return the code of *name*, new or known; that of `other` for what cannot be a stage name.

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
        code = _next_code()  # No other has it, in whichever order handlers end.
        if code > MOST:
            return fmt.CODE_OTHER
        for table in list(tables):
            table.write_name(code, encoded)
        return CODES.setdefault(name, code)


def _refuse(kind: str, sentence: str) -> int:
    for table in list(tables):
        table.count_refused_name()
    say_once(f"{sentence}: counted as `other`, logged once", kind=f"stage name: {kind}")
    return fmt.CODE_OTHER


# Stage names of this process in another's recorder file: the same name may have another code there.
#
# A file's table has two parts: its owner fills it from the front, and processes that write into a
# lent slot of it from the back, one at a time under a lock of the file's bytes (a record lock,
# which has nothing to do with the proof that the owner lives).


_lock = RLock()
_adding = False
"""A signal handler that interrupts the search for a free place must not take that place."""


def _fresh_borrowed_lock_in_child() -> None:
    """A thread that the fork did not take along may hold the parent's."""
    global _lock
    _lock = RLock()


os.register_at_fork(after_in_child=_fresh_borrowed_lock_in_child)


class BorrowedNames:
    """The table of names in the file at *path*, mapped for writing as *memory*."""

    def __init__(self, path: str, memory: memoryview) -> None:
        self._path = path
        self._memory = memory
        self._codes: dict[int, int] = {}
        self._own: dict[int, int] = {}

    def code(self, own: int) -> int:
        """Return the code in that file for the code *own* of this process; `other` when it is full."""
        if own <= len(KNOWN) or own >= fmt.CODE_SPECIAL:
            return own
        code = self._codes.get(own)
        if code is None:
            code = self._codes[own] = self._find_or_add(_name(own))
            self._own[code] = own
        return code

    def own(self, code: int) -> int:
        """Return the code in this process, failed or not, of what was written as *code* there."""
        if code >= fmt.CODE_SPECIAL:
            return code
        plain = code & ~fmt.CODE_FAILED
        found = plain if plain <= len(KNOWN) else self._own.get(plain, fmt.CODE_OTHER)
        return found | (code & fmt.CODE_FAILED)

    def _find_or_add(self, name: bytes) -> int:
        front = range(1, fmt.NAME_CAPACITY - fmt.BORROWED_NAMES + 1)
        for code in front:
            found = self._read(code)
            if found == name:
                return code
            if not found:
                break
        global _adding
        fd = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        try:
            with _lock:
                if _adding:
                    return fmt.CODE_OTHER
                _adding = True
                try:
                    fcntl.lockf(fd, fcntl.LOCK_EX, fmt.NAME_CAPACITY * fmt.NAME_BYTES, fmt.NAMES_AT)
                    return self._find_or_add_behind(name)
                finally:
                    _adding = False
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
    for name, known in list(CODES.items()):
        if known == code:
            return encode(name)
    return b"other"


class BorrowedCodes:
    """A lent slot's codes, as far as a timeline uses them: kept as the file's owner knows them."""

    __slots__ = ("_codes", "_names")

    def __init__(self, codes: memoryview, names: BorrowedNames) -> None:
        self._codes = codes
        self._names = names

    def __setitem__(self, index: int, code: int) -> None:
        self._codes[index] = self._names.code(code)

    def __getitem__(self, index: int) -> int:
        return self._names.own(self._codes[index])

    def __len__(self) -> int:
        return len(self._codes)
