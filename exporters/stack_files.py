"""Stacks as files of other tools: collapsed lines, and speedscope's JSON.

Collapsed: `a;b;c N`, one line a stack, for https://github.com/brendangregg/FlameGraph and its kin;
N is samples. speedscope: https://www.speedscope.app/file-format-schema.json, one profile a stage.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from stagescope.exporters.flame_tree import path_of, stage_of
from stagescope.stacks import Frame, StackSpan

SPEEDSCOPE_SCHEMA = "https://www.speedscope.app/file-format-schema.json"


def collapsed(spans: Sequence[StackSpan]) -> str:
    """Give collapsed lines, the stage first, the most frequent stack first."""
    counts: Counter[str] = Counter()
    for span in spans:
        names = [name.replace(";", ":").replace("\n", " ") for name in path_of(span)]
        counts[";".join(names)] += span.samples
    return "".join(f"{stack} {count}\n" for stack, count in counts.most_common())


def speedscope(spans: Sequence[StackSpan], name: str) -> dict[str, Any]:
    """Give speedscope's document; weights are ns, profiles are stages."""
    frames: dict[Frame, int] = {}
    by_stage: dict[str, list[StackSpan]] = {}
    for span in sorted(spans, key=lambda span: span.start_ns):
        by_stage.setdefault(stage_of(span), []).append(span)
    profiles = [_profile(stage, of_stage, frames) for stage, of_stage in sorted(by_stage.items())]
    return {
        "$schema": SPEEDSCOPE_SCHEMA,
        "name": name,
        "exporter": "stagescope",
        "shared": {
            "frames": [
                {"name": frame.function, "file": frame.file, "line": frame.line} for frame in frames
            ]
        },
        "profiles": profiles,
    }


def _profile(stage: str, spans: Sequence[StackSpan], frames: dict[Frame, int]) -> dict[str, Any]:
    samples = [[frames.setdefault(frame, len(frames)) for frame in span.frames] for span in spans]
    weights = [span.end_ns - span.start_ns for span in spans]
    return {
        "type": "sampled",
        "name": stage,
        "unit": "nanoseconds",
        "startValue": 0,
        "endValue": sum(weights),
        "samples": samples,
        "weights": weights,
    }
