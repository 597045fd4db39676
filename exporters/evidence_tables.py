"""Samples, stacks and kernels of a run folder: each a table that is whole or not there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from stagescope.exporters.parquet import TableFile
from stagescope.kernels import KernelRow
from stagescope.samples import SAMPLE_NAMES, Sample
from stagescope.stacks import Frame, StackSpan
from stagescope.tables import KERNELS, SAMPLES, STACKS, Table

_NAMED = {named.name: named for named in SAMPLE_NAMES}

T = TypeVar("T")


def write_samples(folder: Path, samples: Iterable[Sample]) -> int:
    """Write `samples.parquet` of *folder* and give its rows.

    Where *samples* itself fails in the middle, no file is left; that goes for all three.
    Raises StagescopeError where the file cannot be written.
    """
    return _write(folder, SAMPLES, samples, sample_row)


def write_stacks(folder: Path, stacks: Iterable[StackSpan]) -> int:
    """Write `stacks.parquet` of *folder* and give its rows."""
    return _write(folder, STACKS, stacks, stack_row)


def write_kernels(folder: Path, kernels: Iterable[KernelRow]) -> int:
    """Write `kernels.parquet` of *folder* and give its rows."""
    return _write(folder, KERNELS, kernels, kernel_row)


def _write(
    folder: Path, table: Table, items: Iterable[T], row: Callable[[T], dict[str, Any]]
) -> int:
    with TableFile(folder, table) as file:
        file.extend(map(row, items))
    return file.rows


def sample_row(sample: Sample) -> dict[str, Any]:
    """Give *sample* as a row; unit and kind of a name that only a newer agent knows are empty."""
    named = _NAMED.get(sample.name)
    return {
        "name": sample.name,
        "start_ns": sample.start_ns,
        "end_ns": sample.end_ns,
        "value": sample.value,
        "unit": named.unit if named else "",
        "kind": named.kind if named else "",
        "pid": sample.pid,
        "device": sample.device,
        "detail": sample.detail,
    }


def stack_row(stack: StackSpan) -> dict[str, Any]:
    """Give *stack* as a row."""
    return {
        "pid": stack.pid,
        "thread_id": stack.thread_id,
        "thread": _utf8(stack.thread),
        "start_ns": stack.start_ns,
        "end_ns": stack.end_ns,
        "samples": stack.samples,
        "stage": stack.stage,
        "by": stack.by,
        "running": stack.running,
        "frames": [_shown(frame) for frame in stack.frames],
        "reason": stack.reason,
        "how": stack.how,
    }


def kernel_row(kernel: KernelRow) -> dict[str, Any]:
    """Give *kernel* as a row: its fields are the table's columns."""
    return {column.name: getattr(kernel, column.name) for column in KERNELS.columns}


def _shown(frame: Frame) -> str:
    return _utf8(f"{frame.function} ({frame.file}:{frame.line})")


def _utf8(text: str) -> str:
    """Make text of a file's name that is none: Python holds its odd bytes as lone surrogates."""
    return text.encode("utf-8", "replace").decode("utf-8")
