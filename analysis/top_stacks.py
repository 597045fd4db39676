"""Where the samples of each stage's code were: running or waiting, by line of the user's code."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from functools import lru_cache

import ibis.expr.types as ir

from stagescope.analysis.resource_report import TopStack
from stagescope.analysis.sources import RunTables, row_batches
from stagescope.stacks import parse_frame
from stagescope.stages import OTHER, stage_of

TOP = 3
"""Places kept of each stage: running ones first, one of them a wait where there are waits."""

_AT_A_TIME = 2_000
_LIBRARY = re.compile(r"[/\\](site|dist)-packages[/\\]|[/\\]lib[/\\]python\d|^<", re.IGNORECASE)

Place = tuple[str, str, bool]
"""The innermost frame of the user's, the innermost function where another, and if it ran."""


def top_stacks(tables: RunTables, stacks: ir.Table) -> dict[str, tuple[TopStack, ...]]:
    """Give the top places of *stacks*, which are of *tables*, by stage, both its full name and its outer stage's.

    Stacks of no stage are under `other`, those that ran only: an idle thread waits in none.
    """
    counts: dict[str, dict[Place, int]] = {}
    chosen = stacks.select("stage", "running", "samples", "frames")
    for batch in row_batches(tables, chosen, _AT_A_TIME):
        for row in batch.to_pylist():
            name, frames = row["stage"] or OTHER, row["frames"] or ()
            if frames and (row["running"] or name != OTHER):
                place = (*place_of(frames), bool(row["running"]))
                for key in {name, stage_of(name)}:
                    places = counts.setdefault(key, {})
                    places[place] = places.get(place, 0) + int(row["samples"] or 0)
    return {name: _top(places) for name, places in counts.items()}


def _top(places: Mapping[Place, int]) -> tuple[TopStack, ...]:
    whole = sum(places.values()) or 1
    order = sorted(places.items(), key=lambda item: (-item[1], item[0]))
    found = [
        TopStack(frame, leaf, running, samples, samples / whole)
        for (frame, leaf, running), samples in order
    ]
    ran = [each for each in found if each.running]
    waited = [each for each in found if not each.running]
    kept = ran[: TOP - min(1, len(waited))]
    return (*kept, *waited[: TOP - len(kept)])


def place_of(frames: Sequence[str]) -> tuple[str, str]:
    """Give the innermost frame of the user's own in *frames*, and the innermost function of all.

    Where no frame is the user's, the innermost one stands for it.
    """
    own = next((frame for frame in reversed(frames) if not is_library(frame)), frames[-1])
    return own, "" if own == frames[-1] else parse_frame(frames[-1]).function


@lru_cache(maxsize=16_384)
def is_library(frame: str) -> bool:
    """Tell whether *frame* is of Python itself or of an installed package, by its file."""
    file = parse_frame(frame).file or frame
    if _LIBRARY.search(file):
        return True
    # py-spy may give a file as it is below its folder of sys.path.
    first = re.split(r"[/\\]", file)[0].removesuffix(".py")
    return first in sys.stdlib_module_names
