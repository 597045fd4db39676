"""One trace, whoever else makes spans: FastAPI itself, OpenTelemetry's instrumentation, the app."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import stagescope
from stagescope.identity import stage_span_id

CLIENT = "b7ad6b7169203331"
TRACE = "0af7651916cd43dd8448eb211c80319c"


def serve(mode: str, spool: Path) -> dict[str, Any]:
    """Run the server in a process of its own and give what it tells."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "nesting_server.py"), mode, str(spool)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "PYTHONPATH": str(Path(stagescope.__file__).parent.parent)},
    )
    assert done.returncode == 0, done.stderr
    assert "Failed to detach" not in done.stderr
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return told


def stage_ids(record: dict[str, Any]) -> dict[str, str]:
    """Give the span id of each stage of *record*, as an exporter derives it."""
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
