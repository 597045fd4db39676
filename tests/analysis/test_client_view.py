"""What the client's records tell of streams, rejections and overload."""

from __future__ import annotations

from dataclasses import replace
from io import StringIO
from pathlib import Path

import pytest
from rich.console import Console

from stagescope.analysis.build import build_report
from stagescope.analysis.client_view import is_overloaded
from stagescope.analysis.report import Report
from stagescope.analysis.table import render
from tests.support.runs import MS, client_row, example_run, server_row, write_run_folder


def text(report: Report) -> str:
    """Return the report as a person sees it, without its line breaks."""
    console = Console(width=200, record=True, file=StringIO())
    console.print(render(report))
    return console.export_text()


def test_first_token_and_token_times_of_streams(tmp_path: Path) -> None:
    """The head does not count as a token; the rest of the body counts by its pieces."""
    rows = [
        client_row(
            seq,
            latency_ns=400 * MS,
            first_byte_ns=1_000 * MS + seq * 100 * MS + 5 * MS,
            first_body_ns=1_000 * MS + seq * 100 * MS + 200 * MS,
            chunks=11,
            streamed=True,
        )
        for seq in range(100)
    ]
    folder = write_run_folder(tmp_path, client=rows, server=[])
    report = build_report(folder)
    assert report.client.first_token is not None
    assert report.client.inter_token is not None
    assert report.client.first_token.p50_ms == 200
    assert report.client.inter_token.mean_ms == 20
    assert "first token" in text(report)
    client = report.to_json()["client"]
    assert client["first_token"]["p50_ms"] == 200
    assert client["inter_token"]["mean_ms"] == 20


def test_without_streams_there_are_no_token_times(tmp_path: Path) -> None:
    """Also where the body came in pieces."""
    rows = [client_row(seq, chunks=5) for seq in range(100)]
    report = build_report(write_run_folder(tmp_path, client=rows, server=[]))
    assert report.client.first_token is report.client.inter_token is None
    assert "token" not in text(report)


def test_a_503_of_a_front_end_is_a_rejection_and_no_missing_record(tmp_path: Path) -> None:
    """One that the server recorded is an answer like any other."""
    client = [client_row(seq, status=503 if seq % 4 == 0 else 200) for seq in range(200)]
    server = [server_row(client[seq], {}) for seq in range(200) if seq % 4 or seq == 0]
    run = example_run(server_source="agent")
    report = build_report(write_run_folder(tmp_path, run=run, client=client, server=server))
    assert report.client.rejected == 49
    assert report.unmatched.client.answered == 0
    assert report.valid, report.invalid_reasons
    assert "49 by what stands before the server" in text(report)


@pytest.mark.parametrize(
    ("middle", "end", "count", "overloaded"),
    [
        (50, 50, 300, False),
        (1, 9, 1_000, False),
        (100, 200, 300, True),
        (0, 60, 10_000, False),
        (500, 1_000, 10_000, True),
    ],
)
def test_overload_is_growth_beyond_the_scatter(
    middle: int, end: int, count: int, overloaded: bool
) -> None:
    """Long latency is none, nor is a burst."""
    assert is_overloaded(middle, end, count) is overloaded


def test_an_overloaded_server_is_said_to_be_one(tmp_path: Path) -> None:
    """Each request takes longer than the one before it: the table says so in words."""
    rows = [client_row(seq, latency_ns=(20 + seq * 200) * MS) for seq in range(200)]
    run = replace(example_run(), measured_s=20.0)
    report = build_report(write_run_folder(tmp_path, run=run, client=rows, server=[]))
    assert report.client.overloaded
    assert "did not keep up" in text(report)
    steady = build_report(
        write_run_folder(tmp_path / "steady", run=run,
                         client=[client_row(seq) for seq in range(200)], server=[])
    )  # fmt: skip
    assert not steady.client.overloaded
