"""Who meets whom: missing, doubled and foreign records on both sides."""

from __future__ import annotations

from pathlib import Path

from stagescope.analysis.build import build_report
from tests.support.runs import MS, client_row, failed_row, server_row, write_run_folder

STAGES = {"queue": MS, "inference": 5 * MS}


def test_joins_by_trace_and_parent(tmp_path: Path) -> None:
    """Where every server's parent is the client's span the report says so."""
    client = [client_row(seq) for seq in range(3)]
    server = [server_row(row, STAGES) for row in client]

    join = build_report(write_run_folder(tmp_path, client, server)).join

    assert (join.by, join.requests) == ("trace_id+parent_span_id", 3)


def test_joins_by_trace_alone(tmp_path: Path) -> None:
    """A proxy that puts its own span between leaves the trace id to join by."""
    client = [client_row(seq) for seq in range(3)]
    server = [server_row(row, STAGES, parent_span_id="f" * 16) for row in client]

    join = build_report(write_run_folder(tmp_path, client, server)).join

    assert (join.by, join.requests, join.by_parent) == ("trace_id", 3, 0)


def test_takes_the_child_of_the_client(tmp_path: Path) -> None:
    """Of two services on one trace the one called by the client counts, the other is counted."""
    client = [client_row(seq) for seq in range(2)]
    inner = {"parent_span_id": "e" * 16, "span_id": "d" * 16}
    server = [
        server_row(client[0], {"inference": 9 * MS}) | inner,
        server_row(client[0], {"inference": 3 * MS}),
        server_row(client[1], {"inference": 3 * MS}),
    ]

    report = build_report(write_run_folder(tmp_path, client, server))
    inference = report.part("inference")

    assert inference is not None
    assert inference.mean_ms == 3.0
    assert (report.join.requests, report.join.extra_server) == (2, 1)
    assert report.join.by == "trace_id+parent_span_id"


def test_takes_the_retry_that_was_answered(tmp_path: Path) -> None:
    """Of two attempts under one parent the one whose status the client saw counts."""
    client = client_row(0)
    server = [
        server_row(client, {"inference": 9 * MS}, status=503, span_id="1" * 16),
        server_row(client, {"inference": 4 * MS}, status=200, span_id="2" * 16),
    ]

    inference = build_report(write_run_folder(tmp_path, [client], server)).part("inference")

    assert inference is not None
    assert inference.mean_ms == 4.0


def test_counts_the_unmatched_on_both_sides(tmp_path: Path) -> None:
    """Never sent, failed, answered without a record, and records without a request are apart."""
    client = [
        client_row(0),
        client_row(1),
        failed_row(2, "refused"),
        failed_row(7, "dns", connected_ns=None, sent_ns=None),
        failed_row(3, "timeout"),
        failed_row(4, "timeout"),
        client_row(5, phase="warmup"),
        client_row(6, phase="warmup"),
    ]
    server = [
        server_row(client[0], STAGES),
        server_row(client[5], STAGES),
        server_row(client[6], STAGES),
        server_row(client_row(99), STAGES),
    ]

    unmatched = build_report(write_run_folder(tmp_path, client, server)).unmatched

    assert unmatched.client.total == 4
    assert unmatched.client.before_server == 2
    assert unmatched.client.failed == 1
    assert unmatched.client.answered == 1
    assert unmatched.server == 1


def test_warmup_is_in_no_figure(tmp_path: Path) -> None:
    """Warm-up requests meet their records, and then count nowhere."""
    client = [client_row(0, phase="warmup", latency_ns=900 * MS), client_row(1)]
    server = [server_row(row, STAGES) for row in client]

    report = build_report(write_run_folder(tmp_path, client, server))

    assert (report.client.count, report.join.requests) == (1, 1)
    assert report.total is not None
    assert report.total.mean_ms == 20.0
    assert (report.unmatched.client.total, report.unmatched.server) == (0, 0)
