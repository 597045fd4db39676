"""docs/recorder-format.md tells the numbers that the code has."""

import re
import struct
from pathlib import Path

from stagescope.recorder import format as fmt

PAGE = (Path(__file__).parents[2] / "docs" / "recorder-format.md").read_text("utf-8")


def table(section: str, number: int = 0) -> list[list[str]]:
    """Return the rows of a table of the page, without its head."""
    text = PAGE.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in tables[number].split("\n")
    ]
    return [row for row in rows[2:] if len(row) > 1]


def fields(layout: struct.Struct, start: int) -> list[tuple[int, int]]:
    """Return offset and size of each field of a packed structure."""
    found = []
    for piece in re.findall(r"\d*[a-zA-Z]", layout.format.lstrip("<")):
        count, kind = int(piece[:-1] or 1), piece[-1]
        for _ in range(1 if kind == "s" else count):
            size = struct.calcsize(f"<{piece}" if kind == "s" else f"<{kind}")
            found.append((start, size))
            start += size
    return found


def places(rows: list[list[str]]) -> list[tuple[int, int]]:
    """Return offset and size as a table's first two columns tell them."""
    return [(int(row[0]), int(row[1])) for row in rows]


def test_the_parts_stand_where_the_page_says() -> None:
    """Header, names and slots begin at the page's offsets."""
    parts = {row[0]: row[1:] for row in table("The file")}

    assert parts["names"][:2] == [str(fmt.NAMES_AT), str(fmt.NAME_CAPACITY * fmt.NAME_BYTES)]
    assert f"{fmt.NAME_CAPACITY} stage names of {fmt.NAME_BYTES} bytes" in parts["names"][2]
    assert parts["slots in flight"][:2] == [str(fmt.DATA_AT), f"{fmt.SLOT_BYTES} each"]
    assert f"{fmt.IN_FLIGHT_SLOTS} slots in flight and a ring of {fmt.RING_SLOTS}" in PAGE
    assert f"ends in `{fmt.SUFFIX}`" in PAGE
    assert f"version {fmt.VERSION}, complete" in PAGE


def test_the_header_is_the_pages() -> None:
    """Each field of the header, and each changing word, is at the page's offset."""
    fixed = [*fields(fmt.HEADER, 0), (fmt.HEADER_CRC_AT, 4)]
    words = [
        (8 * fmt.ANCHOR_COUNT_WORD, 1), (8 * fmt.ANCHOR_WORDS, 4), (8 * fmt.COST_BASE_WORD, 1),
        (8 * fmt.COST_STAGE_WORD, 1), (8 * fmt.COUNTER_WORDS, len(fmt.COUNTERS)),
        (8 * fmt.WAIT_WORDS, len(fmt.WAITS)),
    ]  # fmt: skip

    assert places(table("Header")) == fixed
    assert places(table("Header", 1)) == words
    assert f"`{fmt.MAGIC.decode()}`" in table("Header")[0][2]
    assert f"bytes 0 to {fmt.HEADER_CRC_AT - 1}" in table("Header")[-1][2]
    positions = [PAGE.index(f"`{name}`") for name in fmt.COUNTERS]
    assert positions == sorted(positions)


def test_the_slot_is_the_pages() -> None:
    """Each field of a slot is at the page's offset, the entries included."""
    entries = [
        (fmt.CODES_AT, 2 * fmt.ENTRIES_PER_SLOT), (fmt.STARTS_AT, 8 * fmt.ENTRIES_PER_SLOT),
        (fmt.ENDS_AT, 8 * fmt.ENTRIES_PER_SLOT),
    ]  # fmt: skip
    words = [(8 * fmt.BEGIN_WORD, 8), (8 * fmt.COMMIT_WORD, 8)]
    opened, finished = fields(fmt.OPENED, fmt.OPENED_AT), fields(fmt.FINISHED, fmt.FINISHED_AT)
    gaps = fields(fmt.GAPS, fmt.GAPS_AT)

    assert places(table("Slots")) == words + opened + finished + gaps + entries
    assert opened[1][0] == fmt.STATE_AT


def test_the_codes_are_the_pages() -> None:
    """Kinds, states, flags and codes have the page's numbers."""
    rows = {int(row[0]): row[2] for row in table("Slots")}
    codes = [row[0] for row in table("Entries")]

    kinds = (fmt.KIND_REQUEST, fmt.KIND_BATCH, fmt.KIND_CHAIN, fmt.KIND_COLD_START, fmt.KIND_STALL)
    assert kinds == (1, 2, 3, 4, 5)
    assert rows[16] == "kind: 1 request, 2 batch, 3 continuation, 4 cold start, 5 stall"
    assert (fmt.STATE_FREE, fmt.STATE_OPEN, fmt.STATE_FINISHED) == (0, 1, 2)
    assert rows[17] == "state: 0 free, 1 open, 2 finished"
    assert (fmt.FLAG_INTERNAL, fmt.FLAG_SAMPLED) == (1, 2)
    assert codes == [
        f"0x{fmt.CODE_UNUSED:04X}", f"0x{fmt.CODE_OTHER:04X} to 0x7FFF",
        f"0x{fmt.CODE_FAILED:04X} added", f"0x{fmt.CODE_BATCH:04X}", f"0x{fmt.CODE_MEMBER:04X}",
        f"0x{fmt.CODE_MEMBER_TRACE:04X}",
        f"0x{fmt.CODE_RAN:04X} + loop", f"0x{fmt.CODE_READY:04X} + loop",
        f"0x{fmt.CODE_DUE:04X} + loop", f"0x{fmt.CODE_AWAITED:04X} + loop",
        f"0x{fmt.CODE_THREAD:04X}", f"0x{fmt.CODE_QUEUED:04X}", f"0x{fmt.CODE_OFF:04X}",
    ]  # fmt: skip
    assert f"at most {fmt.MAX_CHAIN} slots in all" in PAGE
    assert f"Chain indexes from {fmt.MAX_CHAIN} on" in PAGE
