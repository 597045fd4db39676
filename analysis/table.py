"""The one table: where a request's time went, part by part, as text for a terminal of 80 columns.

The mean column adds up to the client's mean latency; percentile columns are each part's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stagescope.analysis.breakdown import UNKNOWN
from stagescope.analysis.report import Batches, Client, Instrument, Joined, Part, Report
from stagescope.analysis.resources.table import resources_body, resources_lines
from stagescope.stages import OTHER

BAR_WIDTH = 5
UNRECORDED = "–"
_EIGHTHS = " ▏▎▍▌▋▊▉"


def render(report: Report) -> RenderableType:
    """Return head, table and foot of *report*."""
    return Group(
        *_banner(report),
        *_head(report),
        Text(),
        *_body(report),
        Text(),
        *resources_body(report.resources),
        *_foot(report),
    )


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """Draw *share* (a fraction) in *width* cells, to an eighth of a cell."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def label(name: str) -> str:
    """Return a part's name as the table shows it."""
    return {"client_wait": "client wait", UNKNOWN: "server (?)"}.get(name, name)


def _banner(report: Report) -> list[Text]:
    if report.valid:
        return []
    lines = [Text("INVALID: do not draw conclusions from this run", style="bold white on red")]
    lines += [Text(f"  - {reason}", style="red") for reason in report.invalid_reasons]
    return [*lines, Text()]


def _head(report: Report) -> list[RenderableType]:
    run, client = report.run, report.client
    asked = f"{_rate(report, ',.1f')} asked ({run.plan.arrivals}), "
    words = ", ".join(f"{word} {number:,}" for word, number in client.errors.items())
    lines = {
        **({"client": f"requests of {run.client_file}"} if run.client_file else {}),
        "rate": ("" if run.client_file else asked)
        + f"{client.achieved_rate_per_s:,.1f}/s answered, over {run.measured_s:,.1f} s"
        + (" (interrupted)" if run.interrupted else ""),
        "requests": f"{client.count:,} measured, {client.answered:,} answered{_status(client)}",
        "errors": f"{client.failed:,}: {words}" if client.failed else "0",
        **_said_only_where_true(client),
        "server": _source(report.join),
    }
    title = f"{run.plan.method} {run.plan.url}".strip() or f"run {run.run_id}"
    return [Text(title, style="bold", overflow="fold"), _lines(lines)]


def _said_only_where_true(client: Client) -> dict[str, str]:
    """Return the lines on rejections, overload and tokens that this run has."""
    lines: dict[str, str] = {}
    if client.rejected:
        lines["rejected"] = (
            f"{client.rejected:,} by what stands before the server (429 or 503 without a server "
            "record)"
        )
    if client.overloaded:
        lines["overload"] = (
            f"the server did not keep up: {client.in_flight_middle:,} requests in flight "
            f"in the middle of the run, {client.in_flight_end:,} at its end; "
            "percentiles grow with the duration"
        )
    tokens = (("first token", client.first_token), ("per token", client.inter_token))
    for name, figure in tokens:
        if figure:
            lines[name] = (
                f"mean {ms(figure.mean_ms)} ms, p50 {ms(figure.p50_ms)}, p95 {ms(figure.p95_ms)}, "
                f"p99 {ms(figure.p99_ms)}"
            )
    return lines


def _lines(lines: Mapping[str, str]) -> Table:
    """Lay out labelled lines, so that a long one wraps beside its label."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True, min_width=10, style="dim")
    grid.add_column()
    for name, text in lines.items():
        grid.add_row(name, Text(text))
    return grid


def _status(client: Client) -> str:
    classes = "".join(f", {number:,} of {kind}" for kind, number in client.status.items())
    if client.profiled:
        return f"{classes}; {client.profiled:,} profiled by a capture, in no figure below"
    return classes


def _source(join: Joined) -> str:
    if not join.requests:
        return f"no record joined (source: {join.source})"
    clock = "one clock" if join.one_clock == join.requests else "two clocks"
    text = f"{join.source}; {join.requests:,} requests joined by {join.by}; {clock}"
    if join.server_timing:
        return f"{text}; times until the response began, so network holds respond"
    return text


def _body(report: Report) -> list[RenderableType]:
    if report.total is None:
        return [Text("No request was answered: there is no latency to break down.")]
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    table.add_column("part, ms", no_wrap=True, min_width=14)
    for name in ("mean", "p50", "p95", "p99"):
        table.add_column(name, justify="right", no_wrap=True, min_width=8)
    for number, rest in (("share", ""), ("slowest", "1 %")):
        table.add_column(number, justify="right", no_wrap=True, min_width=7)
        table.add_column(rest, no_wrap=True, min_width=BAR_WIDTH)
    parts = shown_parts(report)
    largest = max(parts, key=lambda part: part.mean_ms)
    for part in parts:
        _row(table, part, label(part.name), "bold yellow" if part is largest else "")
        for inner in part.inner:
            _row(table, inner, f"  {inner.name.partition('.')[2]}", "dim")
    table.add_section()
    table.add_row("─" * 14, *["─" * 8] * 4, *["─" * 7, "─" * BAR_WIDTH] * 2, style="dim")
    _row(table, report.total, "client latency", "bold")
    return [table, *_unrecorded(report), *_waits_body(report)]


CAUSE_LABELS = {
    "event_loop": "event loop",
    "gil": "interpreter lock",
    "stopped": "stopped",
    "gc": "garbage coll.",
    "cpu": "CPU",
}


def shown_parts(report: Report) -> list[Part]:
    """Return the rows: each part's own time, and the waits that were taken off, which sum alike."""
    if not report.waits or report.total is None:
        return list(report.parts)
    total = report.total
    rows = [_own_part(part, total) for part in report.parts]
    waits = [
        Part(
            CAUSE_LABELS[wait.cause], wait.mean_ms, wait.p50_ms, wait.p95_ms, wait.p99_ms,
            wait.share, wait.share_slowest,
        )
        for wait in report.waits
        if wait.cause in CAUSE_LABELS
    ]  # fmt: skip
    at = next((i for i, part in enumerate(rows) if part.name == OTHER), len(rows))
    return [*rows[:at], *waits, *rows[at:]]


def _own_part(part: Part, total: Part) -> Part:
    own = part.own
    if own is None or not part.recorded:
        return part
    waited = part.mean_ms - own.mean_ms
    return replace(
        part,
        mean_ms=own.mean_ms,
        p50_ms=own.p50_ms,
        p95_ms=own.p95_ms,
        p99_ms=own.p99_ms,
        share=part.share - (waited / total.mean_ms if total.mean_ms else 0.0),
        share_slowest=own.share_slowest,
        inner=tuple(_own_part(inner, total) for inner in part.inner),
    )


def _waits_body(report: Report) -> list[RenderableType]:
    """Say what was waited for, where and by whom it was held, and what is only an estimate."""
    lines: list[RenderableType] = []
    for cell in report.held[:HELD_SHOWN]:
        waited = next((w for w in report.waits if w.cause == "event_loop"), None)
        if waited is None or not waited.mean_ms or cell.mean_ms < 0.01 * waited.mean_ms:
            continue
        holder = f"{cell.stage} of other requests" if cell.stage else "code outside requests"
        where = f" ({cell.where})" if cell.where and cell.stage else ""
        whole = sum(each.mean_ms for each in report.held if each.waited == cell.waited)
        lines.append(
            Text(
                f"{cell.waited} waited {ms(whole)} ms for the event loop; "
                f"{_percent(cell.mean_ms / whole)} of that while {holder} ran{where}"
            )
        )
    for wait in report.waits:
        if wait.cause in CAUSE_LABELS and wait.high_ms - wait.low_ms > 0.1 * max(wait.mean_ms, 0.1):
            lines.append(
                Text(
                    f"{CAUSE_LABELS[wait.cause]}: {ms(wait.mean_ms)} ms is an estimate, "
                    f"between {ms(wait.low_ms)} and {ms(wait.high_ms)}; the rest stays with "
                    "the stages",
                    style="dim",
                )
            )
    return [Text(), *lines] if lines else []


HELD_SHOWN = 5


def _unrecorded(report: Report) -> list[Text]:
    """Say what the dashes mean, and how to get figures instead."""
    names = [part.name for part in report.stages if not part.recorded]
    if not names:
        return []
    cure = (
        "an agent on the server's host knows more"
        if report.join.server_timing
        else "see docs/python-api.md for marks"
    )
    return [
        Text(
            f"{UNRECORDED} unknown: no mark or hook recorded {', '.join(names)}; time spent there "
            f"is in another row ({cure})",
            style="dim",
        )
    ]


def _row(table: Table, part: Part, name: str, style: str) -> None:
    if not part.recorded:
        table.add_row(Text(name), *[UNRECORDED] * 5, "", UNRECORDED, "", style="dim")
        return
    times = (part.mean_ms, part.p50_ms, part.p95_ms, part.p99_ms)
    shares = (part.share, part.share_slowest)
    table.add_row(
        Text(name),
        *(ms(value) for value in times),
        *(cell for share in shares for cell in (_percent(share), bar(share))),
        style=style,
    )


def ms(value: float) -> str:
    """Return *value* to the microsecond, without a negative nought."""
    text = f"{value:,.3f}"
    return "0.000" if text == "-0.000" else text


def _percent(share: float) -> str:
    text = f"{share:.1%}"
    return "0.0%" if text == "-0.0%" else text


def _foot(report: Report) -> list[RenderableType]:
    unmatched, cost = report.unmatched, report.instrument
    client, further = unmatched.client, report.join.extra_server
    inner = f"; {further:,} more in these traces (inner services, retries)" if further else ""
    lines = {
        "batches": _batches(report.batches),
        "unmatched": f"{client.total:,} of the client's ({client.before_server:,} never sent, "
        f"{client.failed:,} failed, {client.answered:,} answered), "
        f"{unmatched.server:,} of the server's{inner}",
        **_died(report.died),
        "instrument": _instrument(cost),
        **resources_lines(report.resources),
    }
    return [_lines(lines)]


def _instrument(cost: Instrument) -> str:
    if cost.cost_us is None:
        return f"{UNRECORDED} (only an agent knows what recording costs and loses)"
    return (
        f"{cost.cost_us:.1f} µs a request ({cost.stages_per_request:.1f} stages), "
        f"{_or_unknown(cost.dropped, ',')} dropped, "
        f"{_or_unknown(cost.overwritten, ',')} overwritten; the server went on for "
        f"{cost.server_after_ms:.3f} ms after the last byte"
    )


def _or_unknown(value: float | None, form: str) -> str:
    return UNRECORDED if value is None else format(value, form)


def _died(died: Mapping[str, int]) -> dict[str, str]:
    """Return the line on requests whose server process died; nothing where none did."""
    if not died:
        return {}
    stages = ", ".join(f"{many:,} in {stage}" for stage, many in died.items())
    return {"died": f"{sum(died.values()):,} requests with their server process: {stages}"}


def _batches(b: Batches) -> str:
    if not b.count:
        return "none"
    return (
        f"{b.count:,}, {b.failed:,} failed; size mean {b.mean_size:.1f}, p50 {b.p50_size:g}, "
        f"max {b.max_size}; mean wait {b.mean_wait_ms:.3f} ms, "
        f"collate {b.mean_collate_ms:.3f} ms, inference {b.mean_inference_ms:.3f} ms"
        + (" (warm-up included)" if b.warmup_included else "")
    )


def side_by_side(reports: Sequence[Report]) -> RenderableType:
    """Return one table with mean and p99 (ms) a run, and a line on what grew from run to run."""
    table = Table(box=None, padding=(0, 0, 0, 1), pad_edge=False, header_style="bold")
    table.add_column("part, ms", no_wrap=True, min_width=14)
    for report in reports:
        table.add_column(f"{_rate(report)}\nmean", justify="right", no_wrap=True, min_width=9)
        table.add_column("\np99", justify="right", no_wrap=True, min_width=9)
    for name in _names(reports):
        table.add_row(label(name), *(cell for r in reports for cell in _cells(r, name)))
    rule = "─" * 9
    table.add_row("─" * 14, *[rule] * 2 * len(reports), style="dim")
    totals = (cell for r in reports for cell in _cells(r, "client_latency"))
    table.add_row("client latency", *totals, style="bold")
    table.add_row()
    for name, cells in _facts(reports):
        table.add_row(name, *(cell for text in cells for cell in (text, "")))
    grew = [Text(what_grew(before, after)) for before, after in pairwise(reports)]
    return Group(table, Text(), *_invalid(reports), *grew)


def what_grew(before: Report, after: Report) -> str:
    """Say which part's mean grew most, in ms, from *before* to *after*."""
    way = f"{_rate(before)} → {_rate(after)}"
    if before.total is None or after.total is None:
        return f"{way}: nothing to compare, a run has no answered request"
    was = {part.name: part.mean_ms for part in before.parts}
    grown = {part.name: part.mean_ms - was.get(part.name, 0.0) for part in after.parts}
    name = max(grown, key=lambda part: grown[part])
    if grown[name] <= 0:
        return f"{way}: no part grew"
    mean = was.get(name, 0.0)
    whole = after.total.mean_ms - before.total.mean_ms
    return (
        f"{way}: {label(name)} grew most, from {mean:,.3f} to {mean + grown[name]:,.3f} ms "
        f"({grown[name]:+,.3f} ms; client latency {whole:+,.3f} ms)"
    )


def _rate(report: Report, form: str = ",.4g") -> str:
    asked = report.run.plan.rate_per_s
    return report.run.client_file if asked is None else f"{asked:{form}}/s"


def _names(reports: Sequence[Report]) -> list[str]:
    """Return every part's name once; a part that only some runs have stands before `other`."""
    names = dict.fromkeys(part.name for report in reports for part in report.parts)
    last = [name for name in ("other", "unexplained") if name in names]
    return [name for name in names if name not in last] + last


def _cells(report: Report, name: str) -> tuple[str, str]:
    part = report.total if name == "client_latency" else report.part(name)
    if part is None or not part.recorded:
        return UNRECORDED, UNRECORDED
    return ms(part.mean_ms), ms(part.p99_ms)


def _facts(reports: Sequence[Report]) -> list[tuple[str, list[str]]]:
    return [
        ("answered", [f"{r.client.achieved_rate_per_s:,.1f}/s" for r in reports]),
        ("requests", [f"{r.client.count:,}" for r in reports]),
        ("errors", [f"{r.client.failed:,}" for r in reports]),
        ("unmatched", [f"{r.unmatched.client.total + r.unmatched.server:,}" for r in reports]),
    ]


def _invalid(reports: Sequence[Report]) -> list[Text]:
    return [
        Text(f"INVALID at {_rate(report)}: {'; '.join(report.invalid_reasons)}", style="red")
        for report in reports
        if not report.valid
    ]
