"""The header of a recorder file: checked before anything else of the file is believed."""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import Any

from stagescope.errors import RecorderFileError
from stagescope.recorder import format as fmt

_MAX_IN_FLIGHT, _MAX_RING = 1 << 16, 1 << 20
"""No writer makes files with more slots; a forged header must not make us read a sparse giant."""


def check_header(path: Path, header: bytes, size: int) -> tuple[Any, ...]:
    """Check and unpack a header; raises RecorderFileError with file, offset and cause."""
    if header[:8] != fmt.MAGIC:
        raise bad_file(path, 0, f"it is no recorder file (begins {header[:8]!r})")
    if len(header) < fmt.NAMES_AT:
        raise bad_file(path, len(header), f"it is cut off after {size} bytes, inside the header")
    version = int.from_bytes(header[8:10], "little")
    if version > fmt.VERSION:
        raise bad_file(path, 8, f"its format is {version}, this stagescope reads up to "
                            f"{fmt.VERSION}: upgrade stagescope")  # fmt: skip
    if version == 0:
        raise bad_file(path, 8, "its format is 0, which there never was")
    crc_at = fmt.HEADER_CRC_AT
    crc = int.from_bytes(header[crc_at : crc_at + 4], "little")
    if zlib.crc32(header[:crc_at]) != crc:
        raise bad_file(path, crc_at, "its header is damaged (checksum differs)")
    fields = fmt.HEADER.unpack_from(header)
    _, _, _, data_at, slot_bytes, in_flight, ring, names, whole = fields[:9]
    layout = (data_at, slot_bytes, names, whole)
    known_size = 0 < ring <= _MAX_RING and in_flight <= _MAX_IN_FLIGHT
    if not known_size or layout != (
        fmt.DATA_AT, fmt.SLOT_BYTES, fmt.NAME_CAPACITY, fmt.file_bytes(in_flight, ring)
    ):  # fmt: skip
        raise bad_file(path, 12, "its layout is not that of its format")
    if size < fields[8]:
        raise bad_file(path, size, f"it is cut off: {size} bytes of {fields[8]}")
    return fields


def bad_file(path: Path, offset: int, cause: str) -> RecorderFileError:
    return RecorderFileError(f"recorder file {path}, byte {offset}: {cause}")


def padded_text(padded: bytes) -> str:
    """Return the text of a field that is filled up with zero bytes."""
    return padded.rstrip(b"\0").decode("utf-8", "replace")


def service_of(path: Path) -> str:
    """Return the service whose process writes the file; raises RecorderFileError or OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        header = os.pread(fd, fmt.NAMES_AT, 0)
        fields = check_header(path, header, os.fstat(fd).st_size)
    finally:
        os.close(fd)
    return padded_text(fields[14])
