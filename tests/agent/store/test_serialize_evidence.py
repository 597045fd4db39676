"""Samples, stacks and kernels as lines: what is written is read back, and newer agents' too."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.store.serialize import KERNELS, SAMPLES, STACKS, Lines, in_blocks
from stagescope.errors import StagescopeError
from stagescope.kernels import KernelRow
from stagescope.samples import Sample
from stagescope.stacks import StackSpan
from tests.support.evidence import kernel, sample, stack

EACH: list[tuple[Lines[Any], Any]] = [
    (SAMPLES, sample()),
    (STACKS, stack()),
    (KERNELS, kernel()),
]


@given(st.lists(st.builds(Sample, value=st.floats(allow_nan=False))))
def test_samples_come_back(samples: list[Sample]) -> None:
    """Every field of every sample is what it was, to the last bit."""
    assert list(SAMPLES.parse(SAMPLES.write(samples))) == samples


@given(st.lists(st.builds(StackSpan)))
def test_stacks_come_back(stacks: list[StackSpan]) -> None:
    """Every frame of every stack is what it was, in whatever script its names are."""
    assert list(STACKS.parse(STACKS.write(stacks))) == stacks


@given(st.lists(st.builds(KernelRow)))
def test_kernels_come_back(kernels: list[KernelRow]) -> None:
    """Every field of every row is what it was."""
    assert list(KERNELS.parse(KERNELS.write(kernels))) == kernels


@pytest.mark.parametrize(("lines", "item"), EACH, ids=lambda each: getattr(each, "of", ""))
def test_a_newer_agents_fields_and_lines_are_passed_over(lines: Lines[Any], item: Any) -> None:
    """What this version does not know costs nothing of what it knows."""
    (line,) = lines.write([item])
    newer = json.dumps(json.loads(line) | {"colour": "blue"})

    assert list(lines.parse([newer, '{"line": "later"}', line])) == [item, item]


def test_a_newer_agents_frames_are_cut_to_what_is_known() -> None:
    """A frame may get more than function, file and line."""
    (line,) = STACKS.write([stack()])
    newer = json.loads(line)
    newer["frames"] = [[*frame, "more"] for frame in newer["frames"]]

    assert list(STACKS.parse([json.dumps(newer)])) == [stack()]


@pytest.mark.parametrize(("lines", "item"), EACH, ids=lambda each: getattr(each, "of", ""))
@pytest.mark.parametrize("broken", ['{"torn": ', "7", "{}", '{"line": "OF"}'])
def test_a_line_that_is_none_is_named(lines: Lines[Any], item: Any, broken: str) -> None:
    """The sentence has the line's number and what to look at."""
    (line,) = lines.write([item])
    with pytest.raises(StagescopeError, match=rf"line 2 of the agent's {lines.of}s cannot be"):
        list(lines.parse([line, broken.replace("OF", lines.of)]))


@given(st.lists(st.binary(min_size=1, max_size=50)), st.integers(1, 200))
def test_blocks_hold_the_lines(lines: list[bytes], size: int) -> None:
    """Nothing is lost or reordered, and no block but the last is short."""
    blocks = list(in_blocks(lines, size))

    assert b"".join(blocks) == b"".join(lines)
    assert all(len(block) >= size for block in blocks[:-1])
    assert all(blocks)
