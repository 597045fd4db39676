"""Stacks as text for people: the top functions of each stage, and slow against median."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from stagescope.analysis.stack_diff import SlowDiff
from stagescope.stacks import Frame, StackSpan

Function = tuple[str, str]
"""Name and file."""


def top_text(spans: Sequence[StackSpan], about: str, most: int) -> str:
    """Give, for each stage, the functions by their own time and by the time below them."""
    by_stage: dict[str, list[StackSpan]] = {}
    for span in spans:
        by_stage.setdefault(span.stage, []).append(span)
    parts = [about]
    for stage, of_stage in sorted(by_stage.items(), key=lambda item: -_seconds(item[1])):
        parts.append(f"\n{stage or '(no stage)'}  {_seconds(of_stage):.2f} s\n   self  total")
        parts += _lines(of_stage, most)
    return "\n".join(parts) + "\n"


def _lines(spans: Sequence[StackSpan], most: int) -> list[str]:
    own: Counter[Function] = Counter()
    total: Counter[Function] = Counter()
    for span in spans:
        spent = span.end_ns - span.start_ns
        own[_function(span.frames[-1])] += spent
        for function in {_function(frame) for frame in span.frames}:
            total[function] += spent
    whole = sum(own.values()) or 1
    first = sorted(total, key=lambda function: (-own[function], -total[function], function))
    return [
        f" {own[f] / whole:6.1%} {total[f] / whole:6.1%}  {f[0]} ({_short(f[1])})"
        for f in first[:most]
        if own[f]
    ]


def diff_text(diff: SlowDiff, about: str, most: int) -> str:
    """Give the functions whose shares differ most."""
    lines = [about, "", "   slow median   diff  stage: function"]
    lines += [
        f" {f.slow:6.1%} {f.median:6.1%} {100 * f.difference:+6.1f}  "
        + (f"{f.stage}: {f.function} ({_short(f.file)})" if f.function else f"{f.stage}: all of it")
        for f in diff.shares()[:most]
    ]
    return "\n".join(lines) + "\n"


def _seconds(spans: Sequence[StackSpan]) -> float:
    return sum(span.end_ns - span.start_ns for span in spans) / 1e9


def _function(frame: Frame) -> Function:
    return frame.function, frame.file


def _short(file: str) -> str:
    _, packages, inside = file.partition("/site-packages/")
    return inside if packages else "/".join(file.split("/")[-2:])
