"""`python -m tests.planted [NAME...]`: all planted servers, and the matrix of what was said."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from math import comb
from pathlib import Path

from tests.planted.run import Outcome, outcome
from tests.planted.shapes import ALL, HEALTHY


def at_least(right: int, count: int) -> float:
    """Return the one-sided 95 % lower bound of a share (Clopper and Pearson)."""
    return _solved(lambda p: _at_least(right, count, p) < 0.05) if right else 0.0


def at_most(wrong: int, count: int) -> float:
    """Return the one-sided 95 % upper bound of a share."""
    return 1 - at_least(count - wrong, count)


def _at_least(right: int, count: int, p: float) -> float:
    """Return how likely *right* of *count* or more are, each at *p*."""
    return sum(comb(count, k) * p**k * (1 - p) ** (count - k) for k in range(right, count + 1))


def _solved(below: Callable[[float], bool]) -> float:
    """Return the largest share for which *below* holds, by halving."""
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if below(middle) else (low, middle)
    return low


def matrix(outcomes: Sequence[Outcome]) -> str:
    """Return what was planted against what was said, and the three bounds."""
    said: dict[str, Counter[str]] = {}
    for one in outcomes:
        said.setdefault(" or ".join(sorted(one.shape.kinds)), Counter())[one.verdict.kind] += 1
    lines = [
        f"{planted:28} {', '.join(f'{kind} {many}' for kind, many in answers.most_common())}"
        for planted, answers in sorted(said.items())
    ]
    planted = [one for one in outcomes if one.shape not in HEALTHY]
    healthy = [one for one in outcomes if one.shape in HEALTHY]
    for words, right, count in (
        ("kind and stage right", sum(one.right for one in planted), len(planted)),
        ("healthy called none", sum(one.right for one in healthy), len(healthy)),
    ):
        if count:
            lines.append(f"{words}: {right} of {count}, at least {at_least(right, count):.3f}")
    wrong = sum(one.wrong_and_confident for one in outcomes)
    if outcomes:
        most = at_most(wrong, len(outcomes))
        lines.append(f"wrong and confident: {wrong} of {len(outcomes)}, at most {most:.3f}")
    return "\n".join(lines)


def line(one: Outcome) -> str:
    """Return one run's verdict in a line."""
    mark = "ok " if one.right else "OFF"
    verdict = one.verdict
    return (
        f"{mark} {one.shape.name} {one.strength}: {verdict.kind} {verdict.stage} "
        f"({verdict.confidence}): {' | '.join(verdict.evidence[:2])}"
    )


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--strengths", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="where the run folders go")
    parser.add_argument("--within", type=float, default=3600.0, help="seconds, then no more starts")
    asked = parser.parse_args()
    outcomes: list[Outcome] = []
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        place = asked.keep or Path(folder)
        for repeat in range(asked.repeats):
            for shape in (one for one in ALL if not asked.names or one.name in asked.names):
                for strength in asked.strengths:
                    if time.monotonic() - began > asked.within:
                        print("out of time", file=sys.stderr)
                        break
                    to = place / f"{shape.name}-{strength}-{repeat}"
                    if to.exists():
                        continue
                    one = outcome(shape, strength, to, seed=repeat)
                    outcomes.append(one)
                    print(line(one), flush=True)
    print(matrix(outcomes))


if __name__ == "__main__":
    main()
