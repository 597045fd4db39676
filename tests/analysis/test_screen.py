"""The first screen: fits a terminal, in the order of the questions, without a riddle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from stagescope.analysis.build import build_report
from stagescope.analysis.report import Report
from stagescope.analysis.screen import LINES, FirstScreen, side_by_side
from stagescope.analysis.verdict.model import Cost, Step, Verdict
from tests.support.planted_run import planted_run
from tests.support.runs import failed_row, write_run_folder

LONG = Verdict(
    kind="event-loop",
    stage="preprocess",
    resource="event loop",
    utilisation=0.98,
    confidence="high",
    cost=Cost(812.5, 12_345.6, 40.0),
    evidence=(" ".join(["a long sentence"] * 12), "another one that is shorter", "a third"),
    next_steps=tuple(
        Step(f"{word} {' '.join(['something'] * 12)}", "docs/verdicts.md#event-loop")
        for word in ("first", "second", "third")
    ),
)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    """Return the report of a run with everything in it."""
    return build_report(planted_run(tmp_path_factory.mktemp("run")))


def screen(renderable: RenderableType, width: int = 100) -> list[str]:
    """Return what a pipe of *width* columns gets."""
    console = Console(width=width, force_terminal=False)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get().splitlines()


@pytest.mark.parametrize("verdict", [None, LONG])
def test_it_fits_a_terminal_of_24_lines(report: Report, verdict: Verdict | None) -> None:
    """At 100 columns there are at most 24 lines, none wider, and at 80 none is wider than that."""
    shown = FirstScreen(report if verdict is None else replace(report, verdict=verdict))

    assert len(screen(shown)) <= LINES
    assert max(map(len, screen(shown))) <= 100
    assert max(map(len, screen(shown, 80))) <= 80


def test_its_order(report: Report) -> None:
    """Believable, rate, verdict with its evidence, where the time goes, what to do, where more is."""
    lines = screen(FirstScreen(replace(report, verdict=LONG)))
    starts = [line.split()[0] for line in lines if line and not line.startswith(" ")]

    order = ["valid", "load", "rate", "latency", "verdict", "where", "do", "more"]
    assert [word for word in starts if word in order] == order
    text = " ".join("\n".join(lines).split())
    assert "98% used (high confidence), costs 812 ms of p50, 12,346 of p99, 40 requests/s" in text


def test_an_invalid_run_says_so_first(report: Report) -> None:
    """The first word of an INVALID run's screen is that."""
    (first, *_) = screen(FirstScreen(replace(report, invalid_reasons=("driver late",))))

    assert first.startswith("INVALID")
    assert "driver late" in first


def test_a_run_without_answers(tmp_path: Path) -> None:
    """Where nothing was answered a sentence stands in the bars' place."""
    folder = write_run_folder(tmp_path, [failed_row(seq, "reset") for seq in range(5)])

    text = "\n".join(screen(FirstScreen(build_report(folder))))

    assert "No request was answered" in text
    assert "undetermined (low confidence)" in text


def test_several_runs_have_their_verdicts_first(report: Report) -> None:
    """Of several runs each has a line with its verdict, above the table."""
    lines = screen(side_by_side([report, replace(report, verdict=LONG)]))

    assert any("event-loop in preprocess" in line for line in lines[:6])
    assert any(line.startswith("part, ms") for line in lines)
