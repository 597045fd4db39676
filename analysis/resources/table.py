"""What each stage used, as text for a terminal of 80 columns: a table, then what ran in it.

A column stands only where something was measured for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from stagescope.analysis.resources.model import (
    LEAST_SAMPLES,
    CpuTotal,
    DeviceTotal,
    Launches,
    Memory,
    Resources,
    StageUse,
    Streams,
    TopKernel,
    TopStack,
)
from stagescope.stacks import frame_text, parse_frame, short_file
from stagescope.stages import OTHER

WAITS = "waits"
LEAST_SHARE = 0.005
"""What rounds to 0 % has no row."""


def top_rows(stages: Sequence[StageUse]) -> Iterator[tuple[str, Table]]:
    """Return a title and a table for stacks and for kernels, where there are any."""
    seen = [use for use in stages if use.stacks]
    enough = [use for use in seen if use.stack_samples >= LEAST_SAMPLES]
    if enough:
        few = f"; no stage with fewer than {LEAST_SAMPLES}" if len(enough) < len(seen) else ""
        yield f"top stacks (samples of the stage, share of them{few})", _stacks(enough)
    if any(use.kernels or use.launches for use in stages):
        yield "top kernels (share of the stage's busy time)", _kernels(stages)


def _grid() -> Table:
    return Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, show_header=False, expand=True)


def _stacks(stages: Sequence[StageUse]) -> Table:
    grid = _grid()
    grid.add_column(no_wrap=True, min_width=14)
    grid.add_column(justify="right", no_wrap=True, style="dim")
    grid.add_column(justify="right", no_wrap=True, min_width=4)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    for use in stages:
        first = ("no stage" if use.stage == OTHER else use.stage, f"{use.stack_samples:,}")
        for stack in use.stacks:
            if stack.share >= LEAST_SHARE:
                grid.add_row(*map(Text, first), f"{stack.share:.0%}", _stack(stack))
                first = ("", "")
    return grid


def _stack(stack: TopStack) -> Text:
    frame = parse_frame(stack.frame)
    short = frame_text(frame._replace(file=short_file(frame.file)))
    text = Text(short if frame.file else stack.frame)
    if stack.leaf:
        text.append(f" → {stack.leaf}")
    if not stack.running:
        text = Text(f"{WAITS}: ", style="dim").append_text(text)
    return text


def _kernels(stages: Sequence[StageUse]) -> Table:
    grid = _grid()
    grid.add_column(no_wrap=True, min_width=14)
    grid.add_column(justify="right", no_wrap=True, min_width=4)
    grid.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    for use in stages:
        name = "no stage" if use.stage == OTHER else use.stage
        if use.launches:
            grid.add_row(Text(name), "", Text(_bound(use.launches), style="dim"), "", "")
            name = ""
        for kernel in use.kernels:
            if kernel.share < LEAST_SHARE:
                continue
            grid.add_row(Text(name), f"{kernel.share:.0%}", *_kernel(kernel))
            name = ""
    return grid


def _bound(own: Launches) -> str:
    word = f"{own.bound}-bound" if own.bound else "bound not told"
    busy = own.busy_s / own.span_s if own.span_s else 0.0
    return f"{word}: busy {busy:.0%} of {own.span_s * 1e3:,.1f} ms captured"


def _kernel(kernel: TopKernel) -> tuple[Text, str, str]:
    return Text(kernel.name), f"{kernel.launches:,} in", f"{kernel.busy_s * 1e3:,.2f} ms"


ABSENT = "-"
WORTH_A_ROW = 0.01
"""A sub-stage has a row where it has so much of the run's CPU time, or any device time."""
WORTH_A_WORD = 0.0005
"""A collector is named where it used so much of a core."""


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cell: Callable[[StageUse], str]
    """Empty where nothing was measured."""


def resources_body(resources: Resources | None) -> list[RenderableType]:
    """Return the table, top stacks and kernels of *resources*; nothing where there are none."""
    if resources is None or not resources.stages:
        return []
    warm = ", warm-up included" if resources.warmup_included else ""
    head = Text(f"what each stage used, over {resources.window_s:,.1f} s{warm}", style="bold")
    parts: list[RenderableType] = [head, Text(), _table(resources)]
    for title, table in top_rows(resources.stages):
        parts += [Text(), Text(title, style="bold"), table]
    return [*parts, Text()]


def resources_lines(resources: Resources | None) -> dict[str, str]:
    """Return the labelled lines of *resources* for the foot."""
    if resources is None:
        return {}
    lines = {
        "CPU": _cpu(resources.cpu, resources.window_s),
        "device": _device(resources.device),
        "GPU": _gpu(resources),
        "memory": _memory(resources.memory),
        "streams": _streams(resources.streams),
        "collectors": _collectors(resources),
    }
    return {name: text for name, text in lines.items() if text}


def _table(resources: Resources) -> Table:
    stages = resources.stages
    columns = [one for one in _columns(resources.requests) if _occurs(one, stages)]
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    table.add_column("stage", no_wrap=True, min_width=14)
    for column in columns:
        table.add_column(column.head, justify="right", no_wrap=True)
    for use in resources.stages:
        name = "no stage" if use.stage == OTHER else use.stage
        table.add_row(Text(name), *(column.cell(use) or ABSENT for column in columns))
        for inner in _worth_rows(use, resources.cpu):
            cells = (column.cell(inner) or ABSENT for column in columns)
            table.add_row(Text(f"  {inner.stage.partition('.')[2]}"), *cells, style="dim")
    for name, spent in _rest(resources.cpu):
        table.add_row(Text(name), f"{spent:,.2f}", style="bold" if name == "total" else "")
    return table


def _rest(cpu: CpuTotal | None) -> Iterator[tuple[str, float]]:
    """Yield the rows that make the CPU column add up, and what it adds up to."""
    if cpu is None or not cpu.shared_out:
        return
    if cpu.unsampled_s:
        yield "not sampled", cpu.unsampled_s
    yield "total", cpu.cpu_s


def _occurs(column: _Column, stages: Sequence[StageUse]) -> bool:
    return any(column.cell(use) for use in stages)


def _worth_rows(use: StageUse, cpu: CpuTotal | None) -> Iterator[StageUse]:
    least = WORTH_A_ROW * cpu.cpu_s if cpu else 0.0
    for inner in use.sub_stages:
        if inner.device_s or (inner.cpu and inner.cpu.cpu_s and inner.cpu.cpu_s >= least):
            yield inner


def _cpu_s(use: StageUse) -> str:
    return f"{use.cpu.cpu_s:,.2f}" if use.cpu else ""


def _error(use: StageUse) -> str:
    return f"±{use.cpu.error_s:,.2f}" if use.cpu else ""


def _device_s(use: StageUse) -> str:
    return "" if use.device_s is None else f"{use.device_s:,.2f}"


def _busy(use: StageUse) -> str:
    if use.gpu_busy is None:
        return ""
    return f"{'~' if use.gpu_coarse else ''}{use.gpu_busy:.0%}"


def _stall(cause: str, requests: int) -> Callable[[StageUse], str]:
    """Return the cell of milliseconds a request, of all *requests* of the window."""

    def cell(use: StageUse) -> str:
        stalled_s = use.stalls_s.get(cause)
        return f"{stalled_s * 1e3 / requests:,.2f}" if stalled_s and requests else ""

    return cell


def size(count: float | None) -> str:
    """Return bytes in MB (10**6), in GB from ten thousand of these on; empty for None."""
    if count is None:
        return ""
    mega = count / 1e6
    return f"{mega:,.0f} MB" if abs(mega) < 10_000 else f"{mega / 1e3:,.1f} GB"


def _columns(requests: int) -> tuple[_Column, ...]:
    return (
        _Column("CPU s", _cpu_s),
        _Column("±", _error),
        _Column("device s", _device_s),
        _Column("GPU busy", _busy),
        _Column("GPU mem", lambda use: size(use.gpu_memory_bytes)),
        _Column("RSS", lambda use: size(use.rss_bytes)),
        _Column("lag ms", _stall("loop", requests)),
        _Column("GC ms", _stall("gc", requests)),
    )


def _cpu(cpu: CpuTotal | None, window_s: float) -> str:
    if cpu is None:
        return ""
    processes = "1 process" if cpu.processes == 1 else f"{cpu.processes} processes"
    text = f"{cpu.cpu_s:,.2f} s in {processes}, {cpu.cpu_s / window_s:.2f} of a core"
    if not cpu.samples:
        return f"{text}; not split by stage: no stack of these was sampled"
    if not cpu.shared_out:
        return (
            f"{text}; not split by stage: {cpu.samples} running stack samples, and shares of fewer "
            f"than {LEAST_SAMPLES} say nothing"
        )
    words = ", ".join(
        f"{word} {count / cpu.samples:.0%}" for word, count in cpu.known_by.items() if word
    )
    return (
        f"{text}; split by {cpu.samples:,} running stack samples of {_and(cpu.sampled_by)}, "
        f"± one standard error; stage known by: {words}"
    )


def _and(words: Sequence[str]) -> str:
    return " and ".join(words) or "an unknown sampler"


def _device(device: DeviceTotal | None) -> str:
    if device is None:
        return ""
    total = "no stage measured" if device.device_s is None else f"{device.device_s:,.2f} s"
    if device.coverage is None:
        return total
    return f"{total}; {device.coverage:.1%} of the work has a device time"


def _gpu(resources: Resources) -> str:
    if resources.gpu_window_s is None:
        return ""
    text = f"means over the driver's windows of {resources.gpu_window_s:.2g} s, never a request's"
    if any(use.gpu_coarse for use in resources.stages):
        text += "; ~ the stage fills less than half of its windows: its neighbours are in it too"
    return text


def _memory(memory: Memory | None) -> str:
    if memory is None:
        return ""
    text = f"RSS {size(memory.rss_first_bytes)} at first, {size(memory.rss_last_bytes)} at last"
    if memory.slope_bytes_per_s is not None:
        text += f"; grew by {size(memory.slope_bytes_per_s * 60)} a minute, all the time"
    if memory.alloc_retries is not None:
        text += f"; {memory.alloc_retries:,.0f} allocator retries"
    return text


def _streams(streams: Streams | None) -> str:
    if streams is None:
        return ""
    return (
        f"{streams.requests:,}; between chunks mean {streams.mean_ms:,.3f} ms, "
        f"p99 of their means {streams.p99_ms:,.3f} ms, longest {streams.max_ms:,.3f} ms"
    )


def _collectors(resources: Resources) -> str:
    if not resources.collectors:
        return ""
    whole = sum(each.core_share for each in resources.collectors)
    dear = [each for each in resources.collectors if each.core_share >= WORTH_A_WORD]
    rest = len(resources.collectors) - len(dear)
    words = [f"{each.collector} {each.cpu_s:,.2f} s" for each in dear]
    words += [f"{rest} more below {WORTH_A_WORD:.2%} each"] if rest else []
    return f"{whole:.2%} of a core: {', '.join(words)}"
