"""Requests that a capture was at work in are in no figure, and are counted."""

from __future__ import annotations

from pathlib import Path

from stagescope.analysis.build import build_report
from tests.support.runs import MS, batch_row, client_row, server_row, write_run_folder


def test_profiled_requests_are_in_no_figure(tmp_path: Path) -> None:
    """Latency, stages and batches are of the other requests; counts of requests are of all."""
    clients = [client_row(seq, latency_ns=(900 if seq < 2 else 20) * MS) for seq in range(122)]
    server = [
        server_row(row, {"inference": (800 if row["seq"] < 2 else 10) * MS})
        | {"profiled": row["seq"] < 2, "batch_ids": [f"{row['seq'] + 1:016x}"]}
        for row in clients
    ]
    start = clients[0]["intended_ns"]
    batches = [batch_row(seq, size=1, start_ns=start, inference=9 * MS) for seq in range(4)]

    report = build_report(write_run_folder(tmp_path, clients, server, batches))
    inference = report.part("inference")

    assert report.valid
    assert inference is not None
    assert report.client.latency is not None
    assert (inference.mean_ms, inference.p99_ms) == (10.0, 10.0)
    assert (report.client.latency.max_ms, report.batches.count) == (20.0, 2)
    assert (report.client.answered, report.client.profiled, report.join.requests) == (122, 2, 120)
    assert report.unmatched.client.answered == 0


def test_all_profiled(tmp_path: Path) -> None:
    """A run in which every request was profiled has no table, and is INVALID for that."""
    clients = [client_row(seq) for seq in range(3)]
    server = [server_row(row, {"inference": MS}, profiled=True) for row in clients]

    report = build_report(write_run_folder(tmp_path, clients, server))

    assert report.total is None
    assert report.client.latency is None
    assert report.invalid_reasons[0].startswith("only 0 requests were answered without being prof")
