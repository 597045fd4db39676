"""Spans of vLLM, SGLang and Triton as rows of the `server` table."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

from stagescope.errors import StagescopeError
from stagescope.load_run.otlp_spans import OtlpSpan, llm_row, parse_span, server_rows, spans_of
from stagescope.runfolder.schema import SERVER
from stagescope.stages import STAGES

TRITON = Path(__file__).parent / "triton_trace.json"
"""What Triton 2.51 sent for two requests: the second waited for the first one's batch."""

START_NS = 1_764_000_000_000_000_000
MS = 1_000_000

VLLM: dict[str, str | int | float] = {
    "gen_ai.latency.time_to_first_token": 0.05,
    "gen_ai.latency.e2e": 0.3,
    "gen_ai.latency.time_in_queue": 0.01,
    "gen_ai.latency.time_in_model_prefill": 0.03,
    "gen_ai.latency.time_in_model_decode": 0.2,
    "gen_ai.latency.time_in_model_inference": 0.23,
    "gen_ai.usage.prompt_tokens": 12,
    "gen_ai.usage.completion_tokens": 16,
    "gen_ai.request.id": "cmpl-4bf92f35-0",
}
"""The attributes of an `llm_request` span of vLLM's, in its units: seconds."""


def json_export(attributes: Mapping[str, Any], **span: Any) -> dict[str, Any]:
    """Return an OTLP export in JSON with one request span of an LLM server's."""

    def value(found: Any) -> dict[str, Any]:
        if isinstance(found, str):
            return {"stringValue": found}
        return {"intValue": str(found)} if isinstance(found, int) else {"doubleValue": found}

    def pairs(found: Mapping[str, Any]) -> list[dict[str, Any]]:
        return [{"key": name, "value": value(worth)} for name, worth in found.items()]

    own = {
        "traceId": "0af7651916cd43dd8448eb211c80319c",
        "spanId": "b7ad6b7169203331",
        "parentSpanId": "00f067aa0ba902b7",
        "name": "llm_request",
        "kind": 2,
        "startTimeUnixNano": str(START_NS),
        "endTimeUnixNano": str(START_NS + 300 * MS),
        "attributes": pairs(attributes),
    } | span
    resource = {"attributes": pairs({"service.name": "vllm-server", "process.pid": 7})}
    return {"resourceSpans": [{"resource": resource, "scopeSpans": [{"spans": [own]}]}]}


def row_of(export: Any) -> dict[str, Any]:
    """Return the one row that *export* makes."""
    (row,) = server_rows(spans_of(export))
    return row


def parts_ms(row: dict[str, Any]) -> dict[str, float]:
    """Return what each stage and sub-stage is charged, ms."""
    sums: dict[str, float] = {}
    for span in row["stages"]:
        sums[span["stage"]] = sums.get(span["stage"], 0) + span["self_ns"] / MS
    return sums


def test_a_vllm_request_is_queue_prefill_and_decode() -> None:
    """Its attributes become stages; what it does not tell of is `other`; ids join the client's."""
    row = row_of(json_export(VLLM))

    assert row.keys() == {column.name for column in SERVER.columns}
    assert parts_ms(row) == {"queue": 10, "inference.prefill": 30, "inference.decode": 200}
    assert (row["queue_ns"], row["inference_ns"], row["other_ns"]) == (10 * MS, 230 * MS, 60 * MS)
    assert (row["duration_ns"], row["first_byte_ns"]) == (300 * MS, 50 * MS)
    assert (row["trace_id"][:4], row["parent_span_id"]) == ("0af7", "00f067aa0ba902b7")
    assert (row["service"], row["pid"], row["source"]) == ("vllm-server", 7, "otlp")
    assert (row["boot_id"], row["start_ns"], row["start_wall_ns"]) == ("", 0, START_NS)
    assert [span["start_ns"] for span in row["stages"]] == [10 * MS, 20 * MS, 50 * MS]


def test_a_span_of_the_real_sdk_gives_the_same_row() -> None:
    """Encoded by OpenTelemetry's own exporter, as vLLM sends it, protobuf says what JSON said."""
    memory = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource({"service.name": "vllm-server", "process.pid": 7}))
    provider.add_span_processor(SimpleSpanProcessor(memory))
    tracer = provider.get_tracer("vllm.llm_engine")
    span = tracer.start_span("llm_request", kind=SpanKind.SERVER, start_time=START_NS)
    span.set_attributes(VLLM)
    span.end(START_NS + 300 * MS)
    found = row_of(encode_spans(memory.get_finished_spans()))

    ids = ("trace_id", "span_id", "parent_span_id")
    expected = row_of(json_export(VLLM))
    assert {**found, **dict.fromkeys(ids)} == {**expected, **dict.fromkeys(ids)}
    assert found["trace_id"] == f"{span.get_span_context().trace_id:032x}"


def test_an_sglang_request_has_its_queue_in_prefill() -> None:
    """SGLang gives no queue time: its prefill is from the dispatch to the first token."""
    told = {
        "gen_ai.latency.time_to_first_token": 0.05,
        "gen_ai.latency.e2e": 0.3,
        "gen_ai.latency.time_in_model_prefill": 0.045,
        "gen_ai.latency.time_in_model_decode": 0.25,
        "gen_ai.latency.time_in_model_inference": 0.295,
    }
    row = row_of(json_export(told, name="Req 4bf92f35"))

    assert parts_ms(row) == {"inference.prefill": 45, "inference.decode": 250}
    assert (row["queue_ns"], row["other_ns"]) == (0, 5 * MS)


def test_a_failed_request_says_so() -> None:
    """A span with an error status makes a row with an error."""
    row = row_of(json_export(VLLM, status={"code": 2}))

    assert row["error"] == "error"
    assert [span["failed"] for span in row["stages"]] == [False, True, True]


@pytest.mark.parametrize(
    "attributes", [{}, {"http.route": "/v1/completions"}, {"gen_ai.usage.prompt_tokens": 3}]
)
def test_other_spans_are_passed_over(attributes: dict[str, Any]) -> None:
    """Start-up spans, HTTP spans and spans of other tools make no row."""
    assert list(server_rows(spans_of(json_export(attributes)))) == []


SECONDS = st.floats(allow_nan=True, allow_infinity=True) | st.floats(0, 1) | st.text(max_size=3)


@given(
    st.dictionaries(st.sampled_from([name for name in VLLM if ".latency." in name]), SECONDS),
    st.integers(-5, 10**12),
)
def test_a_row_adds_up_whatever_a_span_claims(told: dict[str, Any], length_ns: int) -> None:
    """Endless, negative and nonsense lengths: stages and `other` still equal the duration."""
    ids = {"trace_id": "a" * 32, "span_id": "b" * 16, "parent_span_id": ""}
    span = OtlpSpan(
        **ids, name="llm_request", start_wall_ns=START_NS, end_wall_ns=START_NS + length_ns,
        attributes=told, events={}, failed=False, resource={},
    )  # fmt: skip
    row = llm_row(span)
    if row is not None:
        parts = [row[f"{stage}_ns"] for stage in (*STAGES, "other")]
        assert min(parts) >= 0
        assert sum(parts) == row["duration_ns"]


def test_a_triton_request_is_exact() -> None:
    """Three spans of a real Triton make one row a request; the second one's queue is the first."""
    rows = {
        row["trace_id"][-1]: row for row in server_rows(spans_of(json.loads(TRITON.read_text())))
    }

    assert rows.keys() == {"1", "5"}
    for row in rows.values():
        assert row["parent_span_id"] == "00f067aa0ba902b7"
        assert row["service"] == "triton-inference-server"
        assert 50 * MS < row["inference_ns"] < 70 * MS
        assert sum(row[f"{stage}_ns"] for stage in (*STAGES, "other")) == row["duration_ns"]
    assert rows["1"]["queue_ns"] < 5 * MS
    assert 55 * MS < rows["5"]["queue_ns"] < 65 * MS
    assert {"inference.h2d", "inference.forward", "inference.d2h"} <= parts_ms(rows["5"]).keys()


@pytest.mark.parametrize(
    "span",
    [{}, {"traceId": "xyz"}, {"traceId": "a" * 32, "spanId": "b" * 16}, {"traceId": "a"}, None, 7],
)
def test_what_is_no_span_is_one_sentence(span: Any) -> None:
    """The sentence says what is wrong with it."""
    with pytest.raises(StagescopeError, match="this is no OTLP span"):
        parse_span(span)
