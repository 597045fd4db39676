"""A server that is killed while it streams: span, run folder and report name the same stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from stagescope.errors import StagescopeError
from stagescope.recorder.reader import RecorderReader
from stagescope.recorder.spool import ring_files
from stagescope.records import last_stage
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.support.agents import AgentProcesses
from tests.support.otlp import OtlpReceiver
from tests.support.server_processes import free_port, port_is_free

REQUESTS = 8
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2] / "src")}


@pytest.fixture
def spool() -> Iterator[Path]:
    """A spool with room for a socket's name."""
    with short_spool() as folder:
        yield folder


def stages_in_flight(spool: Path) -> list[str]:
    """Return in which stage each request is that the server works on now."""
    for ring in ring_files(spool):
        with suppress(StagescopeError, FileNotFoundError), RecorderReader(ring) as reader:
            return [last_stage(record) for record in reader.in_flight(time.monotonic_ns())]
    return []


def test_span_run_folder_and_report_name_respond(spool: Path, tmp_path: Path) -> None:
    """`kill -9` while eight responses are under way, in a load run with an agent that exports."""
    port = free_port()
    script = Path(__file__).with_name("streaming_server.py")
    with (
        OtlpReceiver() as receiver,
        AgentProcesses() as agents,
        subprocess.Popen([sys.executable, script, spool, str(port)], env=ENVIRONMENT) as server,
    ):
        try:
            agents(spool, "--otlp", receiver.http_endpoint)
            wait_until(lambda: not port_is_free(port), 30)
            load = subprocess.Popen(
                [sys.executable, "-m", "stagescope", "load", f"http://127.0.0.1:{port}/",
                 "--rate", str(4 * REQUESTS), "--duration", "0.25", "--warmup", "0",
                 "--arrivals", "constant", "--spool", spool, "--out", tmp_path / "run", "--full"],
                env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
            wait_until(lambda: responding(spool) == REQUESTS, 30)
        finally:
            server.kill()
        text, errors = load.communicate(timeout=60)
        died = wait_until(lambda: died_spans(receiver), 30)

    assert died == ["respond.stream"] * REQUESTS
    rows = pq.read_table(tmp_path / "run" / "server.parquet").to_pylist()
    assert [row["died_in_stage"] for row in rows] == ["respond.stream"] * REQUESTS, errors
    assert f"{REQUESTS} requests with their server process: {REQUESTS} in respond.stream" in text
    report = subprocess.run(
        [sys.executable, "-m", "stagescope", "report", tmp_path / "run", "--format", "json"],
        env=ENVIRONMENT, text=True, check=False, stdout=subprocess.PIPE, timeout=60,
    )  # fmt: skip
    assert json.loads(report.stdout)["died"] == {"respond.stream": REQUESTS}


def responding(spool: Path) -> int:
    """Count the requests that are being responded to."""
    return sum(stage == "respond.stream" for stage in stages_in_flight(spool))


def died_spans(receiver: OtlpReceiver) -> list[str]:
    """Return what the spans of dead requests name, once all of them are there."""
    requests = [span for span in receiver.spans if span.kind == "server"]
    named = [span.attributes.get("model_server.died_in_stage", "") for span in requests]
    found = [stage for stage in named if stage]
    return found if len(found) >= REQUESTS else []
