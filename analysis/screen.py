"""The first screen: whether to believe the run, what holds the server back, and what to do.

At most LINES lines at 100 columns; the long tables are in table.py.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.text import Text

from stagescope.analysis import table
from stagescope.analysis.intervals import least
from stagescope.analysis.report import Client, Latency, Part, Report
from stagescope.analysis.table import CAUSE_LABELS, bar, label, shown_parts
from stagescope.analysis.verdict.model import NONE, UNDETERMINED, Cost, Tail, TailRequest, Verdict

LINES = 24
WATERFALL = 40
LEAST_ROWS = 5
EVIDENCE = 2
LABEL = 9
"""Columns of the labels on the left, a blank included."""
BAR = 24
_STYLES = {NONE: "bold green", UNDETERMINED: "bold yellow"}


@dataclass(frozen=True, slots=True)
class FirstScreen:
    """Draws a report's first screen, as wide as there is room."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield its lines."""
        yield from first_screen(self.report, options.max_width)


def first_screen(report: Report, width: int) -> list[Text]:
    """Return the lines of the first screen, none longer than *width*."""
    head = [*_head(report, width), Text()]
    verdict = [*_verdict(report.verdict, width), Text()]
    more = _more(report, width)
    steps = [_step(index, step.text, width) for index, step in enumerate(report.verdict.next_steps)]
    taken = len(head) + len(verdict) + len(more) + 2
    least = min(LEAST_ROWS, len(_parts(report)))
    while len(steps) > 1 and taken + sum(map(len, steps)) + least > LINES:
        steps.pop()
    foot = [line for step in steps for line in step]
    rows = max(LINES - taken - len(foot), least)
    return [*head, *verdict, *_where(report, rows), Text(), *foot, *more]


def short(milliseconds: float) -> str:
    """Return a time as precise as a reader wants it: three digits or so."""
    digits = 0 if milliseconds >= 100 else 1 if milliseconds >= 10 else 2
    return f"{milliseconds:,.{digits}f}"


def _labelled(name: str, text: str, width: int, style: str = "") -> list[Text]:
    """Return *text* wrapped beside its label."""
    wrapped = textwrap.wrap(text, max(width - LABEL, 20)) or [""]
    return [
        Text.assemble(("" if index else name).ljust(LABEL), (line, style))
        for index, line in enumerate(wrapped)
    ]


def _head(report: Report, width: int) -> list[Text]:
    run = report.run
    title = f"{run.plan.method} {run.plan.url}".strip() or f"run {run.run_id}"
    if run.client_file:
        title += f", requests of {run.client_file}"
    counted = report.client.answered - report.client.profiled
    return [
        *_believed(report, width),
        *_labelled("load", textwrap.shorten(title, width - LABEL, placeholder="…"), width, "bold"),
        *_labelled("rate", _rate(report), width),
        *_labelled("latency", _latency(report.client.latency, counted), width),
    ]


def _believed(report: Report, width: int) -> list[Text]:
    if not report.valid:
        reasons = "; ".join(report.invalid_reasons)
        return _labelled("INVALID", f"do not draw conclusions: {reasons}", width, "bold red")
    run, join, count = report.run, report.join, report.client.count
    joined = "all" if join.requests == count else f"{join.requests:,}"
    text = f"{count:,} requests, "
    text += f"{joined} joined with the server's ({join.source})" if join.requests else ""
    text += "" if join.requests else "no record of the server's"
    if "late_p99_ms" in run.driver:
        text += f"; driver up to {run.driver['late_p99_ms']:.1f} ms late (p99)"
    return _labelled("valid", text, width)


def _rate(report: Report) -> str:
    client = report.client
    asked = "" if client.asked_rate_per_s is None else f"{client.asked_rate_per_s:,.4g}/s asked, "
    text = (
        f"{asked}{client.achieved_rate_per_s:,.1f}/s answered over {report.run.measured_s:,.1f} s"
    )
    if report.run.interrupted:
        text += " (interrupted)"
    return f"{text}{_failures(client)}; {_capacity(client)}"


def _failures(client: Client) -> str:
    bad = client.failed + client.status.get("5xx", 0)
    return f", {bad:,} failed" if bad else ""


def _capacity(client: Client) -> str:
    if not client.answered:
        return "nothing was answered"
    if client.overloaded:
        return (
            f"beyond its capacity of about {client.achieved_rate_per_s:,.0f}/s "
            f"({client.in_flight_end:,} in flight at the end)"
        )
    return "it kept up"


def _latency(latency: Latency | None, counted: int) -> str:
    if latency is None:
        return "unknown: no request was answered"
    return (
        f"p50 {_sure(latency.p50_ms, latency.p50_interval_ms)} ms, "
        f"p95 {_sure(latency.p95_ms, latency.p95_interval_ms)}, {_p99(latency, counted)}, "
        f"max {short(latency.max_ms)}"
    )


def _sure(milliseconds: float, interval: tuple[float, float] | None) -> str:
    if interval is None:
        return short(milliseconds)
    return f"{short(milliseconds)} ({short(interval[0])} to {short(interval[1])})"


def _p99(latency: Latency, counted: int) -> str:
    if latency.p99_interval_ms is None:
        return f"p99 unknown: {least(0.99) - counted:,} requests more needed"
    return f"p99 {_sure(latency.p99_ms, latency.p99_interval_ms)}"


def _verdict(verdict: Verdict, width: int) -> list[Text]:
    lines = _labelled("verdict", headline(verdict), width, _STYLES.get(verdict.kind, "bold red"))
    for sentence in verdict.evidence[:EVIDENCE]:
        lines += _labelled("", sentence, width)
    return lines


def headline(verdict: Verdict) -> str:
    """Return the verdict in one line: kind, stage, resource, confidence and cost."""
    text = verdict.kind
    if verdict.kind not in (NONE, UNDETERMINED):
        text += f" in {verdict.stage}" if verdict.stage else ""
        used = verdict.utilisation
        text += f", {verdict.resource} {used:.0%} used" if used and verdict.resource else ""
    return f"{text} ({verdict.confidence} confidence){_costs(verdict.cost)}"


def _costs(cost: Cost) -> str:
    words = []
    if cost.p50_ms is not None:
        words.append(f"{short(cost.p50_ms)} ms of p50")
    if cost.p99_ms is not None:
        words.append(f"{short(cost.p99_ms)} of p99")
    if cost.requests_per_s:
        words.append(f"{cost.requests_per_s:,.0f} requests/s")
    return f", costs {', '.join(words)}" if words else ""


def _where(report: Report, room: int) -> list[Text]:
    """Return a bar a part, its own time, the longest first; waits are parts of their own."""
    parts = _parts(report)
    if not parts:
        return [Text("No request was answered: there is no latency to break down.")]
    shown = parts if len(parts) <= room else parts[: room - 1]
    rows = [_row(part) for part in shown]
    if left := parts[len(shown) :]:
        names = ", ".join(label(part.name) for part in left)
        share = sum(part.share for part in left)
        rows.append(Text(textwrap.shorten(f"and {share:.0%} in {names}", 70), "dim"))
    head = f"{'where the time goes':22}{'mean ms':>10}{'p99 ms':>11}{'share':>7}"
    return [Text(head, style="dim"), *rows]


def _parts(report: Report) -> list[Part]:
    parts = [part for part in shown_parts(report) if part.recorded and part.share >= 0.005]
    return sorted(parts, key=lambda part: -part.mean_ms)


def _row(part: Part) -> Text:
    wait = part.name in CAUSE_LABELS.values()
    name = f"wait: {part.name}" if wait else label(part.name)
    figures = f"{short(part.mean_ms):>10}{short(part.p99_ms):>11}{part.share:>7.0%}"
    style = "yellow" if wait else "cyan"
    return Text.assemble(f"{name[:21]:22}", figures, " ", (bar(part.share, BAR).rstrip(), style))


def _step(index: int, text: str, width: int) -> list[Text]:
    return _labelled("" if index else "do next", f"{index + 1}. {text}", width)


def _more(report: Report, width: int) -> list[Text]:
    docs = next((step.docs for step in report.verdict.next_steps), "docs/verdicts.md")
    text = f"--full, or --format json: stagescope report {report.folder}; {docs}"
    return _labelled("more", text, width)


def side_by_side(reports: Sequence[Report]) -> RenderableType:
    """Return the verdict on each of several runs, and their table."""
    return Group(*_verdicts(reports), Text(), table.side_by_side(reports))


def _verdicts(reports: Sequence[Report]) -> Iterator[Text]:
    for report in reports:
        asked = report.run.plan.rate_per_s
        name = report.run.client_file if asked is None else f"{asked:,.4g}/s"
        style = _STYLES.get(report.verdict.kind, "bold red")
        yield Text.assemble((f"{name}: ", "bold"), (headline(report.verdict), style))
        for sentence in report.verdict.evidence[:1]:
            yield Text(f"  {sentence}")


def slowest(found: Tail) -> Group:
    """Say why the slowest are slow, and draw some of them."""
    lines = [
        Text(f"the slowest {found.requests:,} requests, {short(found.mean_ms)} ms", style="bold"),
        *(Text(f"  - {reason}") for reason in found.reasons),
    ]
    for one in found.exemplars:
        lines += [Text(), *_waterfall(one)]
    return Group(*lines)


def _waterfall(one: TailRequest) -> list[Text]:
    head = f"{one.trace_id}, {short(one.latency_ms)} ms, sent at {one.since_start_s:.1f} s"
    lines = [Text(head, style="dim")]
    for name, begun, length in one.spans:
        before = round(WATERFALL * min(max(begun / one.latency_ms, 0.0), 1.0))
        drawn = max(1, round(WATERFALL * length / one.latency_ms))
        cells = (" " * before + "█" * drawn)[:WATERFALL].ljust(WATERFALL)
        lines.append(Text(f"  {name[:18]:18} {cells} {short(length):>10}"))
    notes = "; ".join(one.notes)
    return [*lines, Text(f"  {notes}", style="dim")] if notes else lines
