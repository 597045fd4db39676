"""What ran in each stage, as text: top stacks and top kernels, three lines a stage at most."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from stagescope.analysis.resource_report import Launches, StageUse, TopKernel, TopStack
from stagescope.stages import OTHER

_FILE = re.compile(r"\(([^()]*[/\\])?([^/\\()]+[/\\][^/\\()]+)\)$")
WAITS = "waits"


def top_rows(stages: Sequence[StageUse]) -> Iterator[tuple[str, Table]]:
    """Give a title and a table for stacks and for kernels, where there are any."""
    if any(use.stacks for use in stages):
        yield "top stacks (share of the stage's samples)", _stacks(stages)
    if any(use.kernels or use.launches for use in stages):
        yield "top kernels (share of the stage's busy time)", _kernels(stages)


def _grid() -> Table:
    grid = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, show_header=False, expand=True)
    grid.add_column(no_wrap=True, min_width=14)
    grid.add_column(justify="right", no_wrap=True, min_width=4)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    return grid


def _stacks(stages: Sequence[StageUse]) -> Table:
    grid = _grid()
    for use in stages:
        name = "no stage" if use.stage == OTHER else use.stage
        for index, stack in enumerate(use.stacks):
            grid.add_row(Text("" if index else name), f"{stack.share:.0%}", _stack(stack))
    return grid


def _stack(stack: TopStack) -> Text:
    text = Text(short(stack.frame))
    if stack.leaf:
        text.append(f" → {stack.leaf}")
    if not stack.running:
        text = Text(f"{WAITS}: ", style="dim").append_text(text)
    return text


def short(frame: str) -> str:
    """Leave a frame's file its last two names."""
    return _FILE.sub(r"(\2)", frame)


def _kernels(stages: Sequence[StageUse]) -> Table:
    grid = _grid()
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for use in stages:
        name = "no stage" if use.stage == OTHER else use.stage
        if use.launches:
            grid.add_row(Text(name), "", Text(_bound(use.launches), style="dim"), "", "")
            name = ""
        for kernel in use.kernels:
            grid.add_row(Text(name), f"{kernel.share:.0%}", *_kernel(kernel))
            name = ""
    return grid


def _bound(own: Launches) -> str:
    word = f"{own.bound}-bound" if own.bound else "bound not told"
    busy = own.busy_s / own.span_s if own.span_s else 0.0
    return f"{word}: busy {busy:.0%} of {own.span_s * 1e3:,.1f} ms captured"


def _kernel(kernel: TopKernel) -> tuple[Text, str, str]:
    return Text(kernel.name), f"{kernel.launches:,} in", f"{kernel.busy_s * 1e3:,.2f} ms"
