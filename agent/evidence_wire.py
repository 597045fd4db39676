"""Samples, stacks and kernels as lines of JSON: what the control API sends.

One line one of them; its field `line` is `sample`, `stack` or `kernel`, its others are named as
in samples.py, stacks.py and kernels.py. A frame of a stack is a list of function, file, line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from stagescope.errors import StagescopeError
from stagescope.kernels import KernelRow
from stagescope.samples import Sample
from stagescope.stacks import Frame, StackSpan

BLOCK_BYTES = 1 << 16

T = TypeVar("T", Sample, StackSpan, KernelRow)


@dataclass(frozen=True, slots=True)
class Lines(Generic[T]):
    """How lines of one kind are written and read."""

    of: str
    """What a line holds: its field `line`."""
    names: tuple[str, ...]
    """Its fields."""
    make: Callable[[dict[str, Any]], T]

    def write(self, items: Iterable[T]) -> Iterator[bytes]:
        """Give the lines of *items*, each with its newline."""
        names = self.names
        for item in items:
            line = {"line": self.of} | {name: getattr(item, name) for name in names}
            yield json.dumps(line, separators=(",", ":")).encode("ascii") + b"\n"

    def parse(self, lines: Iterable[bytes | str]) -> Iterator[T]:
        """Read them back; other lines, and fields that we do not know, are a newer agent's.

        Raises StagescopeError where a line is none of ours.
        """
        for number, line in enumerate(lines, 1):
            try:
                given = json.loads(line)
                if given["line"] == self.of:
                    yield self.make({name: given[name] for name in self.names if name in given})
            except (ValueError, KeyError, TypeError, AttributeError) as problem:
                raise StagescopeError(
                    f"line {number} of the agent's {self.of}s cannot be read ({problem!r}): "
                    "are agent and client of the same stagescope version?"
                ) from problem


def in_blocks(lines: Iterable[bytes], size: int = BLOCK_BYTES) -> Iterator[bytes]:
    """Join lines to blocks of about *size* bytes: a line is little to send alone."""
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= size:
            yield bytes(block)
            block.clear()
    if block:
        yield bytes(block)


def _names(kind: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(kind))


def _sample(given: dict[str, Any]) -> Sample:
    return Sample(**given)


def _stack(given: dict[str, Any]) -> StackSpan:
    given["frames"] = tuple([Frame(*frame[: len(Frame._fields)]) for frame in given["frames"]])
    return StackSpan(**given)


def _kernel(given: dict[str, Any]) -> KernelRow:
    return KernelRow(**given)


SAMPLES = Lines("sample", _names(Sample), _sample)
STACKS = Lines("stack", _names(StackSpan), _stack)
KERNELS = Lines("kernel", _names(KernelRow), _kernel)
