"""`stagescope load --otlp`: the driver's own spans, sent after the load."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from stagescope import load_run
from stagescope.errors import UsageError
from stagescope.load_run import LoadPlan, run_load
from stagescope.middleware.asgi import StageMiddleware
from stagescope.testing import wait_until
from stagescope.testing.spool import short_spool
from tests.cli.test_load_with_agent import app
from tests.support.agents import AgentProcesses
from tests.support.critical_path import PathSpan, critical_path
from tests.support.otlp import OtlpReceiver, ReceivedSpan
from tests.support.serving import served


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


def path_of(spans: list[ReceivedSpan]) -> list[str]:
    return critical_path(
        PathSpan(
            span.name, span.span_id, span.parent_span_id, start := span.start_ns // 1000,
            start + (span.end_ns - span.start_ns) // 1000,
        )
        for span in spans
    )  # fmt: skip


@pytest.mark.parametrize("protocol", ["grpc", "http/protobuf"])
def test_every_trace_begins_with_the_client(
    receiver: OtlpReceiver, protocol: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Driver and agent export: each request is one trace with a CLIENT root, and no parent is missing."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol)
    monkeypatch.setenv("OTEL_METRICS_EXPORTER", "none")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    to = receiver.grpc_endpoint if protocol == "grpc" else receiver.http_endpoint
    with short_spool() as spool, AgentProcesses() as start:
        start(spool, "--otlp", to)
        with served(StageMiddleware(app, spool=spool), lifespan="off") as port:
            folder = run_load(
                LoadPlan(rate_per_s=50, duration_s=0.6, warmup_s=0.1, out=tmp_path / "run", spool=spool, otlp=to),
                f"http://127.0.0.1:{port}/",
            )  # fmt: skip
        sent = int(folder.run.driver["planned"])
        wait_until(lambda: sum(span.kind == "server" for span in receiver.spans) >= sent)
    assert not folder.notes
    of_trace: dict[str, list[ReceivedSpan]] = {}
    for span in receiver.spans:
        if span.name != "cold start" and span.resource["service.name"] in (
            "stagescope-load",
            "model-server",
        ):
            of_trace.setdefault(span.trace_id, []).append(span)
    requests = [spans for spans in of_trace.values() if any(s.kind == "client" for s in spans)]

    assert len(requests) == sent
    for spans in requests:
        ids = {span.span_id for span in spans}
        assert [span.kind for span in spans if not span.parent_span_id] == ["client"]
        assert {span.parent_span_id for span in spans} - {""} <= ids
        assert "GET /" in path_of(spans) or "first byte wait" in path_of(spans)


def test_a_back_end_that_is_gone_costs_a_sentence(tmp_path: Path) -> None:
    """The run is whole and valid; a note says that the driver's spans were not taken, and why."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        nowhere = f"http://127.0.0.1:{gone.getsockname()[1]}"
    with short_spool() as spool, served(StageMiddleware(app, spool=spool), lifespan="off") as port:
        folder = run_load(
            LoadPlan(rate_per_s=50, duration_s=0.3, warmup_s=0.0, out=tmp_path / "run", spool=spool, otlp=nowhere),
            f"http://127.0.0.1:{port}/",
        )  # fmt: skip

    (note,) = [note for note in folder.notes if "driver's own spans" in note]
    assert f"only 0 went to {nowhere} (HTTP): " in note


def test_a_wrong_address_is_told_before_the_run(tmp_path: Path) -> None:
    """Nothing is sent to the server where the spans could go nowhere."""
    with pytest.raises(UsageError, match="port"):
        load_run("http://127.0.0.1:1/", otlp="http://127.0.0.1:port", out=tmp_path / "run")
