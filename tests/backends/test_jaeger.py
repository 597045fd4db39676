"""A load run against the torch server, read back from a real Jaeger: every trace is whole."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq
import pytest

from stagescope.cli.demo_server import TORCH_APP, example_server
from stagescope.examples.image_server.images import sample_jpeg
from stagescope.load_run import LoadPlan, RunFolder, run_load
from stagescope.testing import wait_until
from tests.backends.conftest import Jaeger, path_span, tags
from tests.support.critical_path import critical_path

pytestmark = [pytest.mark.backend, pytest.mark.timeout(300)]

LONG_US = 500
"""Stages that must be on the critical path."""
Trace = list[dict[str, Any]]
"""Its spans."""


@dataclass(frozen=True, slots=True)
class Sent:
    """A load run, and the traces that Jaeger has of it."""

    folder: RunFolder
    requests: list[Trace]
    batches: list[Trace]


@pytest.fixture(scope="module")
def sent(jaeger: Jaeger, tmp_path_factory: pytest.TempPathFactory) -> Sent:
    """Load the server in its real batches, driver and agent exporting to one Jaeger."""
    folder = tmp_path_factory.mktemp("load")
    with pytest.MonkeyPatch.context() as environ:
        environ.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", jaeger.endpoint)
        environ.setenv("OTEL_METRICS_EXPORTER", "none")
        with example_server(folder / "server.log", TORCH_APP) as server:
            server.wait_ready()
            plan = LoadPlan(
                rate_per_s=15, duration_s=6, warmup_s=1, timeout_s=60, out=folder / "run",
                headers=("Content-Type: image/jpeg",), body=sample_jpeg(), spool=server.spool,
            )  # fmt: skip
            ran = run_load(plan, server.url)
            rows = pq.read_table(ran.path / "server.parquet", columns=["trace_id"]).num_rows
            wait_until(lambda: _server_spans(jaeger) >= rows, timeout_s=60)
    traces = [trace["spans"] for trace in jaeger.traces("torch-server")]
    requests = [trace["spans"] for trace in jaeger.traces("stagescope-load")]
    of_requests = {spans[0]["traceID"] for spans in requests}
    others = [spans for spans in traces if spans[0]["traceID"] not in of_requests]
    batches = [t for t in others if any(s["operationName"].startswith("batch ") for s in t)]
    return Sent(ran, requests, batches)


def _server_spans(jaeger: Jaeger) -> int:
    traces = jaeger.traces("stagescope-load")
    return sum(tags(s).get("span.kind") == "server" for t in traces for s in t["spans"])


def test_no_trace_has_a_warning_or_a_missing_parent(sent: Sent) -> None:
    """Every request's trace begins with one CLIENT root that has no reference."""
    for spans in sent.requests:
        roots = [span for span in spans if not span["references"]]
        assert [tags(root)["span.kind"] for root in roots] == ["client"]
    for spans in sent.requests + sent.batches:
        ids = {span["spanID"] for span in spans}
        assert not [span["warnings"] for span in spans if span["warnings"]]
        assert all(path_span(span).parent in ids | {""} for span in spans)


def test_each_request_and_each_real_batch_is_a_trace(sent: Sent) -> None:
    """As many as the run folder has; a batch of one has no trace."""
    sizes = pq.read_table(sent.folder.path / "batches.parquet", columns=["size"]).column(0)
    told = [
        tags(root)["model_server.batch.size"]
        for t in sent.batches
        for root in t
        if not root["references"]
    ]

    assert len(sent.requests) == sent.folder.run.driver["planned"]
    assert sorted(told) == sorted(size for size in sizes.to_pylist() if size > 1)
    assert told, "no batch of two or more: raise the rate"


@pytest.mark.parametrize("kind", ["requests", "batches"])
def test_the_critical_path_holds_the_stages(sent: Sent, kind: str) -> None:
    """As Jaeger's page computes it, it has 95 % of all stages of half a millisecond and more."""
    long: list[bool] = []
    missed: Counter[str] = Counter()
    for spans in getattr(sent, kind):
        on_path = set(critical_path([path_span(span) for span in spans]))
        for span in spans:
            if "model_server.stage" in tags(span) and span["duration"] >= LONG_US:
                long.append(span["operationName"] in on_path)
                missed[span["operationName"]] += not long[-1]

    assert long
    assert sum(long) >= 0.95 * len(long), missed


def test_links_lead_from_requests_to_batches_and_back(sent: Sent) -> None:
    """Every link is found in Jaeger, in both directions, and none is on a trace's root."""
    ids = {(s["traceID"], s["spanID"]) for t in sent.requests + sent.batches for s in t}
    links: dict[str, list[tuple[str, str]]] = {"requests": [], "batches": []}
    for kind, traces in (("requests", sent.requests), ("batches", sent.batches)):
        for spans in traces:
            for span in spans:
                links[kind] += [
                    (ref["traceID"], ref["spanID"])
                    for ref in span["references"]
                    if ref["traceID"] != span["traceID"]
                ]
    members = sum(
        tags(s)["model_server.batch.size"] for t in sent.batches for s in t if not s["references"]
    )

    assert len(links["requests"]) == len(links["batches"]) == members
    assert {*links["requests"], *links["batches"]} <= ids


def test_sums_equal_the_run_folders(sent: Sent) -> None:
    """The stages' self times are those of the run folder, to the nanosecond."""
    spent: Counter[str] = Counter()
    for spans in sent.requests:
        for span in spans:
            told = tags(span)
            if "model_server.stage" in told:
                spent[told["model_server.stage"].partition(".")[0]] += told[
                    "model_server.stage.self_ns"
                ]
    names = ["queue", "preprocess", "batch", "inference", "postprocess", "respond"]
    table = pq.read_table(sent.folder.path / "server.parquet", columns=[f"{n}_ns" for n in names])

    assert {n: spent[n] for n in names} == {
        n: sum(ns or 0 for ns in table.column(f"{n}_ns").to_pylist()) for n in names
    }
