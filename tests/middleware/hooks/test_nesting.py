"""One trace, whoever else makes spans: FastAPI itself, OpenTelemetry's instrumentation, the app."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from stagescope.agent.sinks import publish_export
from stagescope.identity import stage_span_id
from stagescope.middleware.otel_context import (
    LOOK_NS,
    PATIENCE_NS,
    AppTracing,
    exporter_hosts,
    exporting_to,
    host_of,
)
from stagescope.middleware.recording import guard
from stagescope.recorder.spool import EXPORTING_NAME

CLIENT = "b7ad6b7169203331"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def serve(mode: str, spool: Path, asked: str = "1") -> dict[str, Any]:
    """Run the server in a process of its own and give what it tells."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "nesting_server.py"), mode, str(spool)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={
            **os.environ,
            "STAGESCOPE_APP_SPANS": asked,
            "PYTHONPATH": os.environ["PYTHONPATH"],
        },
    )
    assert done.returncode == 0, done.stderr
    assert "Failed to detach" not in done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def stage_ids(record: dict[str, Any]) -> dict[str, str]:
    """Return the span id of each stage of *record*, as an exporter derives it."""
    return {
        name: f"{stage_span_id(int(record['id'], 16), start):016x}"
        for name, start in record["stages"]
    }


@pytest.mark.parametrize(
    "mode",
    ["plain-inside", "plain-outside", "native-inside", "native-outside", "contrib-inside",
     "contrib-outside", "native-contrib-inside", "native-contrib-outside"],
)  # fmt: skip
def test_one_trace_and_nothing_doubled(mode: str, tmp_path: Path) -> None:
    """Each request is one tree with one SERVER span, and no parent is missing in it."""
    told = serve(mode, tmp_path)

    assert told["records"][0]["trace"] == TRACE
    assert told["records"][1]["trace"] != TRACE
    for record in told["records"]:
        spans = [span for span in told["spans"] if span["trace"] == record["trace"]]
        ours = {record["id"], *stage_ids(record).values()}
        known = ours | {span["id"] for span in spans}
        roots = [s for s in [*spans, record] if s["parent"] not in known]
        assert [root["parent"] for root in roots] == [CLIENT if record["trace"] == TRACE else ""]
        servers = sum(s["kind"] == "SERVER" for s in spans) + (not record["internal"])
        assert servers == 1
        assert record["nested"]
    assert {span["trace"] for span in told["spans"]} == {r["trace"] for r in told["records"]}


@pytest.mark.parametrize("mode", ["plain-outside", "native-inside", "contrib-inside"])
def test_spans_of_the_app_hang_under_the_stage(mode: str, tmp_path: Path) -> None:
    """What the app does inside a stage is the stage's child, in a worker thread too."""
    told = serve(mode, tmp_path)

    for record in told["records"]:
        spans = [span for span in told["spans"] if span["trace"] == record["trace"]]
        (model,) = [span for span in spans if span["name"] == "model"]
        (after,) = [span for span in spans if span["name"] == "after"]
        assert model["parent"] == stage_ids(record)["inference"]
        assert after["parent"] != model["parent"]


def test_the_apps_sampler_decides_where_the_trace_begins_with_us(tmp_path: Path) -> None:
    """A share that the app chose is not overruled by our being its parent."""
    told = serve("plain-outside-unsampled", tmp_path)

    with_parent, without = told["records"]
    assert with_parent["sampled"]
    assert not without["sampled"]
    assert {span["trace"] for span in told["spans"]} == {TRACE}


def test_without_a_provider_nothing_is_nested(tmp_path: Path) -> None:
    """OpenTelemetry loaded and not set up costs and changes nothing."""
    told = serve("none", tmp_path)

    assert [(r["nested"], r["internal"]) for r in told["records"]] == [(False, False)] * 2
    assert told["spans"] == []


@pytest.mark.parametrize("mode", ["plain-outside", "contrib-outside", "contrib-inside"])
def test_where_ours_are_not_exported_the_apps_spans_stay_as_they_were(
    mode: str, tmp_path: Path
) -> None:
    """No span of the app names a parent of ours, and each request is recorded."""
    told = serve(mode, tmp_path, asked="")

    known = {span["id"] for span in told["spans"]} | {CLIENT, ""}
    assert {span["parent"] for span in told["spans"]} <= known
    assert [record["nested"] for record in told["records"]] == [False, False]


def test_the_apps_spans_join_only_what_reaches_the_same_back_end(tmp_path: Path) -> None:
    """A published export counts while it is fresh, and its host is compared in every spelling."""
    file = tmp_path / EXPORTING_NAME
    assert exporting_to(tmp_path) == ""

    file.write_text("http://127.0.0.1:4318 (HTTP)", "utf-8")
    assert exporting_to(tmp_path) == host_of("localhost:4317") == "localhost"

    os.utime(file, (0, 0))
    assert exporting_to(tmp_path) == ""

    provider = TracerProvider()
    provider.add_span_processor(
        BatchSpanProcessor(OTLPSpanExporter(endpoint="http://collector:4318/v1/traces"))
    )
    assert exporter_hosts(provider) == {"collector"}
    provider.shutdown()


def test_how_to_join_them_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """After half a minute in which ours went nowhere, with what to do about it."""
    monkeypatch.setattr(guard, "_said", set())
    tracing = AppTracing()

    for second in range(60):
        assert not tracing.nests(tmp_path / "1.ring", LOOK_NS * second)

    (said,) = (record.getMessage() for record in caplog.records)
    assert PATIENCE_NS < 60 * LOOK_NS
    assert "stagescope's own are not exported" in said
    assert "OTEL_EXPORTER_OTLP_ENDPOINT" in said
    assert "STAGESCOPE_APP_SPANS=1" in said


def test_the_agent_publishes_where_it_exports_to_while_that_works(tmp_path: Path) -> None:
    """What succeeded is in the spool; what fails again is not."""
    back_end = SimpleNamespace(exporting_to="http://collector:4318 (HTTP)")
    sinks: Any = {"otlp": back_end}

    publish_export(tmp_path, sinks)
    assert exporting_to(tmp_path) == "collector"

    back_end.exporting_to = ""
    publish_export(tmp_path, sinks)
    assert exporting_to(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []
