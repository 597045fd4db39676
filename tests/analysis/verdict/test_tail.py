"""Why the slowest requests are slow."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from stagescope.analysis.build import build_report
from stagescope.analysis.screen import slowest
from tests.support.runs import MS, client_row, server_row, write_run_folder


def test_the_stage_that_is_longer_in_the_slowest(tmp_path: Path) -> None:
    """Four of 400 requests spend 300 ms more in preprocess: that is said, and five are drawn."""
    slow = (7, 100, 200, 300)
    client = [
        client_row(seq, latency_ns=(320 if seq in slow else 20) * MS, response_bytes=9_000)
        if seq in slow
        else client_row(seq)
        for seq in range(400)
    ]
    server = [
        server_row(
            row, {"preprocess": (302 if row["seq"] in slow else 2) * MS, "inference": 9 * MS}
        )
        for row in client
    ]

    tail = build_report(write_run_folder(tmp_path, client, server)).tail

    assert tail is not None
    assert (tail.requests, tail.mean_ms) == (4, 320.0)
    assert "300.0 ms more in `preprocess`" in tail.reasons[0]
    assert any("9,000 bytes" in reason for reason in tail.reasons)
    assert [one.trace_id for one in tail.exemplars[:4]] == [client[seq]["trace_id"] for seq in slow]
    assert len(tail.exemplars) == 5


def test_records_without_a_span_of_their_own_are_each_of_one_request(tmp_path: Path) -> None:
    """`Server-Timing` gives no span ids: a request is still counted, and drawn, once."""
    client = [client_row(seq) for seq in range(120)]
    server = [server_row(row, {"inference": 9 * MS}, span_id="") for row in client]

    tail = build_report(write_run_folder(tmp_path, client, server)).tail

    assert tail is not None
    assert tail.requests == 1
    assert len({one.trace_id for one in tail.exemplars}) == 5


def test_a_waterfall_fits_a_terminal(tmp_path: Path) -> None:
    """An exemplar is its trace id and a bar a stage, no line wider than 80 columns."""
    client = [client_row(seq) for seq in range(120)]
    server = [server_row(row, {"preprocess": 6 * MS, "inference": 9 * MS}) for row in client]
    tail = build_report(write_run_folder(tmp_path, client, server)).tail
    assert tail is not None

    console = Console(width=80, force_terminal=False)
    with console.capture() as capture:
        console.print(slowest(tail))

    lines = capture.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert any(tail.exemplars[0].trace_id in line for line in lines)
