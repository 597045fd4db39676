"""`stagescope load --otlp-listen`: the model server's own spans are the server's side."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from pathlib import Path

import pytest
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import SpanKind
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from stagescope import load_run
from stagescope.analysis.build import build_report
from stagescope.load_run import collect
from tests.support.http_server import Exchange, ScriptedServer

QUEUE_S, PREFILL_S, DECODE_S = 0.004, 0.010, 0.020


class SpanningServer:
    """Answers like an LLM server that traces itself: the sleeps and the spans are real.

    It is no vLLM: its spans have the name and the attributes of vLLM's `llm_request`, sent by
    OpenTelemetry's own SDK and exporter, in batches.
    """

    def __init__(self, endpoint: str) -> None:
        self._provider = TracerProvider()
        exporter = OTLPSpanExporter(f"{endpoint}/v1/traces")
        self._provider.add_span_processor(BatchSpanProcessor(exporter, schedule_delay_millis=50))
        self._tracer = self._provider.get_tracer("vllm.llm_engine")

    async def answer(self, exchange: Exchange) -> None:
        """Answer one request and leave its span."""
        began = time.time_ns()
        await asyncio.sleep(QUEUE_S + PREFILL_S + DECODE_S)
        await exchange.reply(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok")
        parent = TraceContextTextMapPropagator().extract(
            {"traceparent": exchange.header("traceparent")}
        )
        span = self._tracer.start_span(
            "llm_request", parent, SpanKind.SERVER, start_time=began, attributes={
                "gen_ai.latency.time_in_queue": QUEUE_S,
                "gen_ai.latency.time_in_model_prefill": PREFILL_S,
                "gen_ai.latency.time_in_model_decode": DECODE_S,
                "gen_ai.latency.time_to_first_token": QUEUE_S + PREFILL_S,
                "gen_ai.latency.e2e": QUEUE_S + PREFILL_S + DECODE_S,
            },
        )  # fmt: skip
        span.end()

    def close(self) -> None:
        """Send what waits, and stop."""
        self._provider.shutdown()


def test_the_spans_of_a_model_server_join_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every request is joined by its trace; queue, prefill and decode are as the server said."""
    monkeypatch.setattr(collect, "SPANS_SETTLED_S", 1.0)
    with socket.socket() as held:  # bound and not listening: the port is ours to reuse
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{held.getsockname()[1]}"
        spanning = SpanningServer(endpoint)
        with ScriptedServer(spanning.answer) as server:
            folder = load_run(
                server.url, rate_per_s=10, duration_s=1.0, warmup_s=0.1, out=tmp_path / "run",
                spool=tmp_path / "no-agent", otlp_listen=(endpoint,),
            )  # fmt: skip
        spanning.close()
    report = build_report(folder)
    assert report.join.source == "otlp"
    assert report.join.requests == report.client.answered > 0
    found = {part.name: part.mean_ms for part in report.stages}
    assert found["queue"] == pytest.approx(QUEUE_S * 1e3)
    inner = {each.name: each.mean_ms for part in report.stages for each in part.inner}
    assert inner["inference.prefill"] == pytest.approx(PREFILL_S * 1e3)
    assert inner["inference.decode"] == pytest.approx(DECODE_S * 1e3)
    assert json.loads((folder / "run.json").read_text())["server_source"] == "otlp"
