"""How a row of the kernel table is made, and how rows travel between processes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from stagescope.agent.torch_trace import CaptureFacts
from stagescope.errors import StagescopeError
from stagescope.kernels import KernelRow

ROWS_NAME = "kernels.ndjson"
"""In a capture's folder in the spool: what an agent takes up of a capture that others made."""


def row(
    facts: CaptureFacts,
    stage: str,
    kind: str,
    name: str,
    device: str,
    launches: int,
    busy_ns: int,
    *,
    span_ns: int = 0,
    idle_ns: int = 0,
    host_wait_ns: int = 0,
    bound: str = "",
    unmatched: int = 0,
) -> KernelRow:
    """Make a row of the capture of *facts*."""
    return KernelRow(
        facts.capture_id, facts.pid, facts.since_ns, facts.until_ns, stage, kind, name, device,
        launches, busy_ns, span_ns, idle_ns, host_wait_ns, bound, unmatched,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Recorded:
    """A capture as an agent keeps it."""

    facts: CaptureFacts
    rows: tuple[KernelRow, ...]


def write_rows(folder: Path, recorded: Recorded) -> None:
    """Write `kernels.ndjson` of *folder*, whole or not at all. Raises OSError."""
    told = [asdict(recorded.facts), *[asdict(one) for one in recorded.rows]]
    lines = [json.dumps(one) for one in told]
    part = folder / f"{ROWS_NAME}.part"
    part.write_text("\n".join(lines) + "\n", "utf-8")
    part.rename(folder / ROWS_NAME)


def read_rows(file: Path) -> Recorded:
    """Read what `write_rows` wrote. Raises StagescopeError where it is torn or of another version."""
    try:
        first, *rest = [json.loads(line) for line in file.read_bytes().splitlines()]
        return Recorded(CaptureFacts(**first), tuple([KernelRow(**one) for one in rest]))
    except (OSError, TypeError, ValueError) as problem:
        raise StagescopeError(f"{file} cannot be read: {problem}") from problem


def by_stage(rows: Iterable[KernelRow]) -> list[tuple[KernelRow, list[KernelRow]]]:
    """Give each stage's row with the rows of what ran in it, the busiest stage first."""
    every = list(rows)
    heads = sorted([one for one in every if one.kind == "stage"], key=lambda one: -one.busy_ns)
    return [
        (head, [one for one in every if one.kind != "stage" and _of(one) == _of(head)])
        for head in heads
    ]


def _of(one: KernelRow) -> tuple[str, str]:
    return one.stage, one.device
