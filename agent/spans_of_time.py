"""Arithmetic on stretches of time: union, length, and what lies within what."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Stretch = tuple[int, int]
"""From, until; ns."""


def union(stretches: Iterable[Stretch]) -> list[Stretch]:
    """Give what at least one of *stretches* covers, in order, without overlaps."""
    covered: list[Stretch] = []
    for start, end in sorted(stretches):
        if end <= start:
            continue
        if covered and start <= covered[-1][1]:
            covered[-1] = covered[-1][0], max(end, covered[-1][1])
        else:
            covered.append((start, end))
    return covered


def length(stretches: Iterable[Stretch]) -> int:
    """Give the sum of the lengths."""
    return sum([end - start for start, end in stretches])


def common(one: Sequence[Stretch], other: Sequence[Stretch]) -> list[Stretch]:
    """Give what lies in both; each is a union."""
    both: list[Stretch] = []
    i = j = 0
    while i < len(one) and j < len(other):
        start, end = max(one[i][0], other[j][0]), min(one[i][1], other[j][1])
        if start < end:
            both.append((start, end))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    return both


def gaps(covered: Sequence[Stretch], since: int, until: int) -> list[Stretch]:
    """Give what *covered*, a union, leaves open from *since* to *until*."""
    edges = [since, *[edge for stretch in covered for edge in stretch], until]
    pairs = zip(edges[::2], edges[1::2], strict=True)
    return [(max(a, since), min(b, until)) for a, b in pairs if max(a, since) < min(b, until)]
