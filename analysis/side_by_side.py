"""Several runs beside each other, and in one sentence what grew from one to the next."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stagescope.analysis.report import Report
from stagescope.analysis.table import label, ms


def side_by_side(reports: Sequence[Report]) -> RenderableType:
    """Give one table with mean and p99 (ms) a run, and a line on what grew from run to run."""
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


def _rate(report: Report) -> str:
    return f"{report.run.plan.rate_per_s:,.4g}/s"


def _names(reports: Sequence[Report]) -> list[str]:
    """Give every part's name once; a part that only some runs have stands before `other`."""
    names = dict.fromkeys(part.name for report in reports for part in report.parts)
    last = [name for name in ("other", "unexplained") if name in names]
    return [name for name in names if name not in last] + last


def _cells(report: Report, name: str) -> tuple[str, str]:
    part = report.total if name == "client_latency" else report.part(name)
    return ("-", "-") if part is None else (ms(part.mean_ms), ms(part.p99_ms))


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
