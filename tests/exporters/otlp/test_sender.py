"""Records go out as OTLP, over real sockets, to back ends that are well and to some that are not."""

from __future__ import annotations

import logging
import socket
import threading
import time
import tracemalloc
from collections.abc import Iterator
from functools import partial

import pytest

from stagescope.errors import UsageError
from stagescope.exporters.otlp.queue import QueueLimits
from stagescope.exporters.otlp.sender import OtlpSpans, otlp_from_environment
from stagescope.exporters.tail_sampling import Share, TailSampler
from stagescope.records import Member, Record
from stagescope.testing import wait_until
from stagescope.testing.records import SPAN_ID, TRACE_ID, batch_record, request_record
from tests.support.otlp import Behaviour, OtlpReceiver

PROTOCOLS = ("grpc", "http/protobuf", "http/json")
FAULTS = (Behaviour.REFUSE, Behaviour.THROTTLE, Behaviour.HANG, Behaviour.CLOSE)
SPANS_EACH = 9
"""Of one `request_record()`: its own and eight stages."""
BATCH_ATTRIBUTES = {
    "model_server.batch.size", "model_server.model", "model_server.batch.worker",
    "model_server.batch.position",
}  # fmt: skip


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(params=PROTOCOLS)
def protocol(
    request: pytest.FixtureRequest, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The environment points at the receiver, by this protocol."""
    named = str(request.param)
    point_at(receiver.grpc_endpoint if named == "grpc" else receiver.http_endpoint, monkeypatch)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", named)
    return named


def point_at(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")


def sink_from_environment() -> OtlpSpans:
    sink = otlp_from_environment(TailSampler(Share(0.0, 0.0, 0.0)))
    assert sink is not None
    return sink


def load_requests(count: int) -> list[Record]:
    return [request_record(run_id="r1", span_id=f"{index + 1:016x}") for index in range(count)]


def send(*records: Record) -> OtlpSpans:
    sink = sink_from_environment()
    sink.accept(records)
    sink.close(10)
    return sink


def test_request_arrives_whole(protocol: str, receiver: OtlpReceiver) -> None:
    """A request arrives with its ids, times, resource and stages, each stage nested in its own."""
    sink = send(request_record(run_id="r1", parent_span_id="00f067aa0ba902b7"))
    by_name = {span.name: span for span in receiver.spans}
    own = by_name["POST /predict"]

    assert [delivery.protocol for delivery in receiver.deliveries] == [protocol]
    assert (own.trace_id, own.span_id, own.parent_span_id) == (
        TRACE_ID,
        SPAN_ID,
        "00f067aa0ba902b7",
    )
    assert (own.kind, own.status, own.scope) == ("server", "unset", "stagescope")
    assert own.end_ns - own.start_ns == 10_000_000
    assert own.resource["service.name"] == "resnet-api"
    assert own.resource["process.pid"] == 4242
    assert own.attributes["http.request.method"] == "POST"
    assert own.attributes["http.response.status_code"] == 200
    assert own.attributes["model_server.load_run.id"] == "r1"
    assert {span.parent_span_id for span in receiver.spans} == {
        "00f067aa0ba902b7", SPAN_ID, by_name["batch"].span_id,
    }  # fmt: skip
    assert by_name["batch.wait"].parent_span_id == by_name["batch"].span_id
    assert by_name["inference"].attributes["model_server.stage.self_ns"] == 7_000_000
    assert {span.trace_id for span in receiver.spans} == {TRACE_ID}
    assert all(span.events == 0 for span in receiver.spans)
    assert (sink.accepted, sink.settled, sink.counters()["sent_spans"]) == (1, 1, SPANS_EACH)


def test_batch_and_member_link_to_each_other(protocol: str, receiver: OtlpReceiver) -> None:
    """A batch goes out once, for the first member that is kept; stages link, both ways."""
    ids = (SPAN_ID, "00000000000000bb")
    batch = batch_record(size=2, members=tuple(Member(TRACE_ID, span_id) for span_id in ids))
    members = [
        request_record(status=500, span_id=span_id, batch_ids=(batch.batch_id,)) for span_id in ids
    ]
    sink = send(batch, *members)
    (of_batch,) = [span for span in receiver.spans if span.name == "batch resnet50"]
    linked = [(span.name, span.links) for span in receiver.spans if span.links]

    assert linked == [
        ("inference", ((TRACE_ID, SPAN_ID), (TRACE_ID, "00000000000000bb"))),
        *[("inference", ((of_batch.trace_id, of_batch.span_id),))] * 2,
    ]
    assert (of_batch.span_id, of_batch.trace_id) == (batch.batch_id, batch.trace_id)
    assert sink.counters()["sent_spans"] == len(receiver.spans)


def test_a_batch_of_one_is_told_by_its_request(protocol: str, receiver: OtlpReceiver) -> None:
    """A batch of one is no trace: its size, model, worker and place are on the request's stage."""
    batch = batch_record(run_id="r1")
    send(batch, request_record(run_id="r1", batch_ids=(batch.batch_id,)))
    told = {
        span.name: {key: value for key, value in span.attributes.items() if key in BATCH_ATTRIBUTES}
        for span in receiver.spans
        if span.attributes.keys() & BATCH_ATTRIBUTES
    }

    assert {span.trace_id for span in receiver.spans} == {TRACE_ID}
    assert told == {
        "inference": {
            "model_server.batch.size": 1, "model_server.model": "resnet50",
            "model_server.batch.worker": 4242, "model_server.batch.position": 0,
        }
    }  # fmt: skip
    assert not any(span.links for span in receiver.spans)


def test_batch_of_none_that_are_kept_stays(protocol: str, receiver: OtlpReceiver) -> None:
    """A batch none of whose members is kept is not sent, and holds nothing up."""
    batch = batch_record(size=2)
    member = request_record(batch_ids=(batch.batch_id,), sampled=False)
    sink = send(batch, member)

    assert receiver.spans == []
    assert (sink.accepted, sink.settled, sink.counters()["not_kept_requests"]) == (2, 2, 1)


def test_spans_say_by_what_probability_they_were_kept(
    protocol: str, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All spans of a request have OpenTelemetry's threshold: 0 for an error, the share's for others."""
    sink = otlp_from_environment(TailSampler(Share(0.25, 0.25, 0.0)))
    assert sink is not None
    sink.accept([request_record(trace_id="ab" * 16) for _ in range(9)])  # so that the floor is low
    sink.accept([request_record(status=500), request_record(trace_id="ff" * 16)])
    sink.close(10)
    of = {
        trace_id: {span.trace_state for span in receiver.spans if span.trace_id == trace_id}
        for trace_id in (TRACE_ID, "ff" * 16)
    }

    assert of == {TRACE_ID: {"ot=th:0"}, "ff" * 16: {"ot=th:c"}}


def test_headers_and_compression_are_the_environments(
    protocol: str, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OTEL_EXPORTER_OTLP_HEADERS and _COMPRESSION are honoured."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=blue")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "gzip")
    send(request_record(run_id="r1"))
    (delivery,) = receiver.deliveries

    assert delivery.headers["x-tenant"] == "blue"
    assert delivery.encoding == "gzip" or protocol == "grpc"  # gRPC hides it from the service


def test_traces_endpoint_goes_before_the_general(
    receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OTEL_EXPORTER_OTLP_TRACES_ENDPOINT is taken as it is, and first."""
    point_at("http://127.0.0.1:1", monkeypatch)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiver.http_endpoint}/v1/traces")
    send(request_record(run_id="r1"))

    assert len(receiver.spans) == SPANS_EACH


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_back_end_costs_neither_time_nor_memory(
    protocol: str, receiver: OtlpReceiver, fault: Behaviour, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back end that takes nothing: `accept` returns, the queue stays in its bounds, drops are
    counted, `close` comes back in time and its thread is gone."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "900")
    receiver.behave(fault)
    before = set(threading.enumerate())
    sink = sink_from_environment()
    sink.accept(load_requests(50))
    wait_until(lambda: receiver.attempts)
    for _ in range(20):
        sink.accept(load_requests(100))
        assert sink.queued_spans <= 900
    counts = sink.counters()
    began = time.monotonic()
    sink.close(1.0)

    assert time.monotonic() - began < 5  # of a hanging request's 10 s
    assert counts["dropped_full_spans"] > 0
    counts = sink.counters()
    assert counts["sent_spans"] == 0
    assert sum(counts[name] for name in counts if name.startswith("dropped")) == 2_050 * SPANS_EACH
    assert sink.accepted == 2_050
    assert sink.settled <= 2_050  # the next agent reads again what was still waiting
    assert not [
        t for t in set(threading.enumerate()) - before if t.name.startswith("stagescope-otlp")
    ]


def test_newest_are_dropped(
    protocol: str, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits longest is sent; what finds no room is what came last."""
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", str(10 * SPANS_EACH))
    sink = sink_from_environment()
    sink.accept(load_requests(10_000))
    sink.close(10)
    sent = [int(span.span_id, 16) for span in receiver.spans if span.kind == "server"]

    assert sent[:10] == list(range(1, 11))
    assert len(sent) < 10_000


def _has_failed(sink: OtlpSpans, times: int) -> bool:
    return sink.counters()["failed_exports"] >= times


def test_back_end_that_comes_back_is_used_again(
    protocol: str, receiver: OtlpReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    """After an outage spans arrive again; the outage is logged once, and its end once."""
    receiver.behave(Behaviour.THROTTLE)
    sink = sink_from_environment()
    with caplog.at_level(logging.DEBUG):
        for failures in range(1, 4):
            sink.accept(load_requests(1))
            wait_until(partial(_has_failed, sink, failures))
        receiver.behave(Behaviour.OK)
        sink.accept(load_requests(1))
        wait_until(lambda: receiver.spans)
        wait_until(lambda: "takes spans again" in caplog.text)
    sink.close(5)
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]

    assert [record.name for record in said] == ["stagescope.exporters.otlp.sending"] * 2
    assert "spans cannot be sent to http://127.0.0.1:" in said[0].getMessage()


@pytest.mark.parametrize("protocol_of_dead", PROTOCOLS)
def test_nobody_listens(protocol_of_dead: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A port where nobody listens: the records are counted as dropped, and close is in time."""
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    point_at(f"http://127.0.0.1:{port}", monkeypatch)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", protocol_of_dead)
    sink = sink_from_environment()
    sink.accept(load_requests(5))
    began = time.monotonic()
    sink.close(1.0)

    assert time.monotonic() - began < 5
    counts = sink.counters()
    assert counts["dropped_failed_spans"] + counts["dropped_closed_spans"] == 5 * SPANS_EACH


def test_memory_is_bounded(receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seventy thousand spans into a back end that hangs hold a few MB, not all of them."""
    point_at(receiver.http_endpoint, monkeypatch)
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "2000")
    receiver.behave(Behaviour.HANG)
    sink = sink_from_environment()
    tracemalloc.start()
    try:
        for _ in range(40):
            sink.accept(load_requests(200))
        held = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    sink.close(0.5)

    assert held < 8_000_000


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_nothing_is_sent_unasked(environ: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    """No endpoint, a disabled SDK, or the exporter `none`: no sink, no thread."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)

    assert otlp_from_environment() is None


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_TRACES_EXPORTER", "zipkin"),
        ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "udp"),
        ("OTEL_EXPORTER_OTLP_COMPRESSION", "brotli"),
        ("OTEL_EXPORTER_OTLP_TIMEOUT", "soon"),
        ("OTEL_BSP_MAX_QUEUE_SIZE", "many"),
        ("OTEL_BSP_SCHEDULE_DELAY", "0"),
        ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "http://127.0.0.1:port"),
    ],
)
def test_bad_variable_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that cannot be used is refused at the start, in a sentence that shows it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=value):
        otlp_from_environment()


def test_close_twice_and_accept_after(protocol: str, receiver: OtlpReceiver) -> None:
    """Closing again does nothing; what comes after is counted as dropped."""
    sink = send(request_record(run_id="r1"))
    sink.close(1)
    sink.accept(load_requests(1))

    assert sink.counters()["dropped_closed_spans"] == SPANS_EACH
    assert (sink.accepted, sink.settled) == (2, 2)


def test_few_spans_are_sent_at_once_while_few_wait() -> None:
    """What an agent that is killed sends again is little; a slow back end is given more at once."""
    limits = QueueLimits()
    assert [limits.at_once(waiting) for waiting in (0, 4096, 8192, 65_536)] == [256, 256, 512, 2048]
    assert QueueLimits(batch_spans=100).at_once(65_536) == 100
