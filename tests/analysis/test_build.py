"""A report as a whole: figures against NumPy, and runs that went wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from stagescope.analysis.build import build_report
from tests.support.runs import (
    MS,
    batch_row,
    client_row,
    example_run,
    failed_row,
    server_row,
    write_run_folder,
)

STAGES = {"queue.batch": 2 * MS, "batch.wait": MS, "inference": 6 * MS}


def test_figures_are_numpys(tmp_path: Path) -> None:
    """Means, linearly interpolated percentiles and the slowest 1 % are those of NumPy."""
    rng = np.random.default_rng(1)
    latency = rng.exponential(50 * MS, 333).astype(np.int64) + 20 * MS
    inference = rng.exponential(5 * MS, 333).astype(np.int64)
    client = [client_row(seq, latency_ns=int(ns)) for seq, ns in enumerate(latency)]
    server = [
        server_row(row, {"inference": int(ns)}) for row, ns in zip(client, inference, strict=True)
    ]

    report = build_report(write_run_folder(tmp_path, client, server))
    part, slowest = report.part("inference"), np.argsort(-latency)[:3]

    assert part is not None
    assert report.client.latency is not None
    assert part.mean_ms == pytest.approx(inference.mean() / MS)
    expected = np.percentile(inference, [50, 95, 99], method="linear") / MS
    assert [part.p50_ms, part.p95_ms, part.p99_ms] == pytest.approx(expected)
    assert part.share == pytest.approx(inference.mean() / latency.mean())
    assert part.share_slowest == pytest.approx(inference[slowest].mean() / latency[slowest].mean())
    assert report.client.latency.p99_ms == pytest.approx(np.percentile(latency, 99) / MS)


def test_means_add_up(tmp_path: Path) -> None:
    """The parts' means sum to the client's mean latency, and their shares to one."""
    client = [client_row(seq, latency_ns=(20 + seq) * MS) for seq in range(120)]
    server = [server_row(row, STAGES, other_ns=MS) for row in client]

    report = build_report(write_run_folder(tmp_path, client, server))

    assert report.valid
    assert report.total is not None
    assert report.client.latency is not None
    assert sum(part.mean_ms for part in report.parts) == pytest.approx(report.total.mean_ms)
    assert report.total.mean_ms == pytest.approx(report.client.latency.mean_ms)
    assert sum(part.share for part in report.parts) == pytest.approx(1.0)
    assert sum(part.share_slowest for part in report.parts) == pytest.approx(1.0)
    assert [part.name for part in report.stages] == [
        "queue",
        "preprocess",
        "batch",
        "inference",
        "postprocess",
        "respond",
    ]


def test_batches_of_the_measured_phase(tmp_path: Path) -> None:
    """Batches from before the first measured request are left out where one clock tells."""
    client = [client_row(seq) for seq in range(2)]
    server = [server_row(row, STAGES) for row in client]
    spent = {"batch__wait": 2 * MS, "batch__collate": MS, "inference": 6 * MS}
    batches = [
        batch_row(0, size=1, start_ns=0, inference=900 * MS),
        batch_row(1, size=2, start_ns=client[0]["intended_ns"], **spent),
        batch_row(2, size=4, start_ns=client[1]["intended_ns"], **spent) | {"error": "OSError"},
    ]

    found = build_report(write_run_folder(tmp_path, client, server, batches)).batches

    assert (found.count, found.failed, found.max_size) == (2, 1, 4)
    assert (found.mean_size, found.p50_size) == (3.0, 3.0)
    assert found.mean_wait_ms == 2.0
    assert found.mean_collate_ms == 1.0
    assert found.mean_inference_ms == 6.0
    assert not found.warmup_included


def test_instrument_cost(tmp_path: Path) -> None:
    """The cost of a request is the base and that of its mean number of stages."""
    client = [client_row(seq) for seq in range(2)]
    server = [server_row(row, STAGES, stages_dropped=1) for row in client]
    lost = {"request_us": 3.0, "stage_us": 0.5, "overwritten": 2.0, "dropped": 1.0}

    folder = write_run_folder(tmp_path, client, server, run=example_run(instrument=lost))
    report = build_report(folder)

    assert report.instrument.cost_us == pytest.approx(4.5)
    assert (report.instrument.overwritten, report.instrument.dropped) == (2, 1)
    assert report.instrument.stages_dropped == 2
    assert "the server side overwrote 2 records" in report.invalid_reasons
    assert "the server side dropped 1 records" in report.invalid_reasons


def test_server_timing_has_one_network(tmp_path: Path) -> None:
    """The header's sums end when the response begins, so the network is one number."""
    client = [client_row(seq) for seq in range(3)]
    header = {"source": "server-timing", "start_ns": None, "stages": None}
    server = [server_row(row, {"inference": 6 * MS}) | header for row in client]

    folder = write_run_folder(
        tmp_path, client, server, run=example_run(server_source="server-timing")
    )
    report = build_report(folder)
    network = report.part("network")

    assert network is not None
    assert (network.mean_ms, network.inner) == (12.0, ())
    assert (report.join.server_timing, report.join.one_clock) == (3, 0)


def test_no_server_side(tmp_path: Path) -> None:
    """Without server records service time is one part, and that alone invalidates nothing."""
    client = [client_row(seq) for seq in range(120)]
    run = example_run(server_source="none")

    report = build_report(write_run_folder(tmp_path, client, run=run))

    assert report.valid
    assert report.stages == ()
    assert {part.name: part.mean_ms for part in report.parts} == {
        "client_wait": 1.0,
        "connect": 1.0,
        "server (unknown)": 18.0,
        "unexplained": 0.0,
    }


def test_missing_server_tables_of_a_run_without_server(tmp_path: Path) -> None:
    """A run that had no server side may lack its files."""
    run = example_run(server_source="none")
    folder = write_run_folder(tmp_path, [client_row(0)], run=run)
    (folder / "server.parquet").unlink()
    (folder / "batches.parquet").unlink()

    assert build_report(folder).join.by == "none"


def test_empty_run(tmp_path: Path) -> None:
    """A run that was interrupted before its first request has a report, and it is INVALID."""
    run = example_run(interrupted=True, measured_s=0.0)

    report = build_report(write_run_folder(tmp_path, [], run=run))

    assert not report.valid
    assert (report.total, report.parts, report.client.count) == (None, (), 0)
    assert json.loads(json.dumps(report.to_json()))["total"] is None


def test_all_failed(tmp_path: Path) -> None:
    """Where nothing was answered errors are counted by word, and there is no latency."""
    client = [failed_row(seq, "refused" if seq % 3 else "timeout") for seq in range(9)]

    report = build_report(write_run_folder(tmp_path, client))

    assert not report.valid
    assert report.client.latency is None
    assert list(report.client.errors.items()) == [("refused", 6), ("timeout", 3)]
    assert report.unmatched.client.before_server == 6


def test_any_status_is_an_answer(tmp_path: Path) -> None:
    """A 503 is a response with a latency; status classes keep it visible."""
    client = [client_row(0), client_row(1, status=503)]
    server = [server_row(row, STAGES) for row in client]

    report = build_report(write_run_folder(tmp_path, client, server))

    assert (report.client.answered, report.join.requests) == (2, 2)
    assert report.client.status == {"2xx": 1, "5xx": 1}


def test_unmatched_records_invalidate(tmp_path: Path) -> None:
    """More than one answered request in a hundred without a record makes the run INVALID."""
    client = [client_row(seq) for seq in range(200)]
    server = [server_row(row, STAGES) for row in client[3:]]

    report = build_report(write_run_folder(tmp_path, client, server))

    assert [reason for reason in report.invalid_reasons if "met no partner" in reason]


def test_what_the_driver_says_against_itself_stands_in_the_report(tmp_path: Path) -> None:
    """The driver judges its own lateness; the report repeats it and is INVALID."""
    client = [client_row(seq) for seq in range(120)]
    server = [server_row(row, STAGES) for row in client]
    run = example_run(invalid_reasons=("driver late: it used 97 % of a core",))

    report = build_report(write_run_folder(tmp_path, client, server, run=run))

    assert (report.valid, report.invalid_reasons) == (False, run.invalid_reasons)


def test_answers_after_the_measured_phase_are_no_throughput(tmp_path: Path) -> None:
    """A server that answers one request in two in time shows half the rate that was asked."""
    client = [client_row(seq, latency_ns=(20 if seq % 2 else 20_000) * MS) for seq in range(120)]
    server = [server_row(row, STAGES) for row in client]
    run = example_run()

    report = build_report(write_run_folder(tmp_path, client, server, run=run))

    inside = sum(row["last_byte_ns"] <= client[0]["intended_ns"] + 10**10 for row in client)
    assert report.client.achieved_rate_per_s == inside / run.measured_s < 6
