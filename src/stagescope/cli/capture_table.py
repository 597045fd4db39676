"""What a capture prints: the kernel table by stage, as text for a terminal of 80 columns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagescope.agent.kernels.rows import by_stage
from stagescope.agent.kernels.table import KernelTable
from stagescope.agent.kernels.trace import CaptureFacts
from stagescope.kernels import KernelRow

MOST_NAMES = 6
"""Kernels or operators of one stage that are shown; the JSON has all."""
NAME_WIDTH = 40

BOUNDS = {
    "launch": "the device waits for the host to launch work",
    "kernel": "the device is busy: faster kernels, or a smaller model",
    "copy": "copies hold it up: pin memory, or copy less",
    "sync": "the host waits for the device",
    "mixed": "no single reason",
}


def lines_of(facts: CaptureFacts, table: KernelTable) -> Iterator[str]:
    """Yield the lines of the table and of what is known about it."""
    head = ("stage", "launches", "open ms", "busy ms", "idle", "host wait", "bound")
    lines = [head, *[cells for pair in by_stage(table.rows) for cells in _cells(*pair)]]
    if not facts.device:  # who has no device waits for none, and launches nothing
        lines = [cells[:5] for cells in lines]
        lines[0] = ("stage", "calls", *lines[0][2:])
    yield from aligned(lines)
    bounds = {row.bound for row in table.rows if row.bound}
    yield from (f"{name}-bound: {BOUNDS[name]}" for name in sorted(bounds & {*BOUNDS} - {"mixed"}))
    yield from _caveats(table)


def _cells(head: KernelRow, rows: Sequence[KernelRow]) -> Iterator[tuple[str, ...]]:
    device = "" if head.device == "cpu" else f" on {head.device}"
    yield (
        f"{head.stage or 'no stage'}{device}", f"{head.launches:,}", _ms(head.span_ns),
        _ms(head.busy_ns), _share(head.idle_ns, head.span_ns),
        _share(head.host_wait_ns, head.span_ns), head.bound,
    )  # fmt: skip
    for row in rows[:MOST_NAMES]:
        yield f"  {_short(row.name)}", f"{row.launches:,}", "", _ms(row.busy_ns), "", "", ""
    rest = rows[MOST_NAMES:]
    if rest:
        launches, busy = sum([r.launches for r in rest]), sum([r.busy_ns for r in rest])
        yield f"  {len(rest)} more", f"{launches:,}", "", _ms(busy), "", "", ""


def aligned(lines: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """Return the lines of a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for cells in lines:
        first, *others = zip(cells, widths, strict=True)
        words = [first[0].ljust(first[1]), *[cell.rjust(width) for cell, width in others]]
        yield "  ".join(words).rstrip()


def _caveats(table: KernelTable) -> Iterator[str]:
    if unmatched := sum([row.unmatched for row in table.rows]):
        yield f"{unmatched:,} launches whose work was not seen"
    if table.nowhere:
        yield f"{table.nowhere:,} of {table.works:,} outside every stage"
    if table.by_time:
        yield (
            f"{table.by_time:,} of {table.works:,} on threads without a stage: told by the one "
            "inference under way"
        )
    if table.ambiguous:
        yield (
            f"{table.ambiguous:,} of {table.works:,} on an event loop with several requests in "
            "different stages: counted for the stage opened last"
        )


def _ms(ns: int) -> str:
    return f"{ns / 1e6:,.2f}"


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else ""


def _short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else f"{name[: NAME_WIDTH - 1]}…"
