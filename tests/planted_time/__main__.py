"""`python -m tests.planted_time [SHAPE...]`: all planted servers at all loads, as a table.

With --keep DIR the runs are kept, and --again reports on them another time."""

from __future__ import annotations

import argparse
import tempfile
from itertools import product
from pathlib import Path

from tests.planted_time.planted import (
    LOADS,
    LOOPS,
    SHAPES,
    held_against_truth,
    lines,
    outcome,
    served,
)


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shapes", nargs="*", default=[shape.path for shape in SHAPES])
    parser.add_argument("--loops", nargs="*", default=LOOPS)
    parser.add_argument("--loads", nargs="*", type=float, default=LOADS)
    parser.add_argument("--keep", type=Path, help="where the run folders go")
    parser.add_argument("--again", action="store_true", help="report on what was kept, run nothing")
    asked = parser.parse_args()
    if asked.again:
        for loop, load in product(asked.loops, asked.loads):
            for shape in (shape for shape in SHAPES if shape.path in asked.shapes):
                place = asked.keep / f"{shape.path}-{loop}-{load}"
                if place.exists():
                    print("\n".join(lines(held_against_truth(loop, shape, load, place))))
        return
    for loop in asked.loops:
        with served(loop) as server, tempfile.TemporaryDirectory() as folder:
            for shape in (shape for shape in SHAPES if shape.path in asked.shapes):
                for load in asked.loads:
                    place = (asked.keep or Path(folder)) / f"{shape.path}-{loop}-{load}"
                    print("\n".join(lines(outcome(server, loop, shape, load, place))), flush=True)


main()
