"""Metrics go out as OTLP, over real sockets, to back ends that are well and to some that are not."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from stagescope.errors import UsageError
from stagescope.exporters.aggregation import DURATION_BOUNDS_S
from stagescope.exporters.otlp.metrics import OtlpMetrics, otlp_metrics_from_environment
from stagescope.exporters.prometheus import StageMetrics
from stagescope.exporters.sample_series import Series, Shown
from stagescope.samples import AMOUNT, LEVEL, SampleName
from stagescope.testing import wait_until
from stagescope.testing.records import WAITS, batch_record, request_record
from tests.support.evidence import sample
from tests.support.otlp import Behaviour, OtlpReceiver
from tests.support.otlp_points import ReceivedPoint

PROTOCOLS = ("grpc", "http/protobuf", "http/json")
FAULTS = (Behaviour.REFUSE, Behaviour.THROTTLE, Behaviour.HANG, Behaviour.CLOSE)
CPU = SampleName("process.cpu.time", "s", AMOUNT, "CPU time.", detail="cpu.mode")
POWER = SampleName("hw.power", "W", LEVEL, "Power drawn.")


@pytest.fixture
def receiver() -> Iterator[OtlpReceiver]:
    """A back end."""
    with OtlpReceiver() as receiver:
        yield receiver


@pytest.fixture(params=PROTOCOLS)
def protocol(
    request: pytest.FixtureRequest, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The environment points at the receiver, by this protocol."""
    named = str(request.param)
    endpoint = receiver.grpc_endpoint if named == "grpc" else receiver.http_endpoint
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", endpoint)
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_PROTOCOL", named)
    return named


def read_now() -> Shown:
    """Return a counter of a served process and a gauge of a device, read a second ago."""
    now_ns = time.monotonic_ns()
    fresh = {"start_ns": now_ns - 2 * 10**9, "end_ns": now_ns - 10**9}
    cpu = sample(name=CPU.name, pid=7, detail="user", **fresh)
    power = sample(name=POWER.name, value=220.5, device="GPU-1", detail="", **fresh)
    return Shown((Series(CPU, cpu, 12.5, "resnet-api"), Series(POWER, power, 999.0, "")))


def counted() -> StageMetrics:
    """Return metrics that hold two requests and a batch."""
    metrics = StageMetrics()
    metrics.accept([request_record(), request_record(route=""), batch_record(size=6)])
    return metrics


def sink_from_environment(shown: Callable[[], Shown] = read_now) -> OtlpMetrics:
    """Return the sink that the environment asks for."""
    sink = otlp_metrics_from_environment(counted(), shown)
    assert sink is not None
    return sink


def of_name(receiver: OtlpReceiver, name: str) -> list[ReceivedPoint]:
    return [point for point in receiver.points if point.name == name]


def test_waits_arrive_as_histograms(protocol: str, receiver: OtlpReceiver) -> None:
    """Own time by stage, and waits by stage and cause, of the requests of a load run."""
    metrics = StageMetrics()
    metrics.accept([request_record(), request_record(run_id="r1", wait_facts=WAITS)])
    sink = otlp_metrics_from_environment(metrics, read_now)
    assert sink is not None
    sink.close(10)
    waits = {
        (point.attributes["model_server.stage"], point.attributes["model_server.wait.cause"]): point
        for point in of_name(receiver, "model_server.stage.wait")
    }
    (own,) = [
        point
        for point in of_name(receiver, "model_server.stage.own")
        if point.attributes["model_server.stage"] == "inference"
    ]

    assert (own.kind, own.unit, own.count) == ("histogram", "s", 1)
    assert waits.keys() == {
        ("preprocess", "cpu"), ("inference", "event_loop"), ("inference", "gc"),
        ("respond", "stopped"),
    }  # fmt: skip
    assert waits["inference", "event_loop"].count == 1


def test_samples_arrive_as_gauges_and_sums(protocol: str, receiver: OtlpReceiver) -> None:
    """Value, unit, attributes, times and the resource of each, as OpenTelemetry has them."""
    before_ns = time.time_ns()
    sink_from_environment().close(10)
    (delivery,) = receiver.deliveries
    (cpu,) = of_name(receiver, CPU.name)
    (power,) = of_name(receiver, POWER.name)

    assert delivery.protocol == protocol
    assert (cpu.kind, cpu.unit, cpu.value) == ("sum", "s", 12.5)
    assert (cpu.cumulative, cpu.monotonic) == (True, True)
    assert cpu.attributes == {"process.pid": 7, "cpu.mode": "user"}
    assert cpu.resource["service.name"] == "resnet-api"
    assert before_ns <= cpu.start_ns <= cpu.time_ns <= time.time_ns()
    assert (power.kind, power.unit, power.value) == ("gauge", "W", 220.5)
    assert power.attributes == {"hw.id": "GPU-1"}
    assert power.resource["service.name"] == "stagescope-agent"
    assert power.resource["host.name"] == socket.gethostname()
    assert before_ns - 2 * 10**9 < power.time_ns < cpu.time_ns


def test_histograms_arrive_with_their_buckets(protocol: str, receiver: OtlpReceiver) -> None:
    """Requests and stages in seconds and a batch's size, each with its labels as attributes."""
    sink_from_environment().close(10)
    (named, unnamed) = of_name(receiver, "http.server.request.duration")
    stages = {
        p.attributes["model_server.stage"]: p
        for p in of_name(receiver, "model_server.stage.duration")
        if p.attributes.get("http.route")
    }
    (size,) = of_name(receiver, "model_server.batch.size")

    assert (named.kind, named.unit, named.cumulative) == ("histogram", "s", True)
    assert named.attributes == {
        "http.request.method": "POST", "http.route": "/predict", "model_server.status_class": "2xx",
    }  # fmt: skip
    assert "http.route" not in unnamed.attributes
    assert (named.count, named.value, sum(named.buckets)) == (1, 0.01, 1)
    assert named.bounds == DURATION_BOUNDS_S
    assert named.buckets[DURATION_BOUNDS_S.index(0.01)] == 1
    assert stages["inference"].count == 1
    assert stages["inference"].value == pytest.approx(0.007)
    assert (size.attributes, size.value, size.unit) == ({"model_server.model": "resnet50"}, 6, "")


def test_it_sends_at_its_interval(
    protocol: str, receiver: OtlpReceiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again and again by itself, and once more at the end; all of it is counted."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "30")
    sink = sink_from_environment()
    wait_until(lambda: len(receiver.deliveries) >= 3)
    sink.close(10)

    assert sink.counters()["sent_points"] == len(receiver.points)
    assert sink.counters()["unsent_points"] == 0


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_back_end_costs_counted_drops(
    protocol: str,
    receiver: OtlpReceiver,
    fault: Behaviour,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Points are dropped and counted, close is in time, the thread is gone, one line is said."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "10")
    receiver.behave(fault)
    before = set(threading.enumerate())
    sink = sink_from_environment()
    wait_until(lambda: receiver.attempts)
    began = time.monotonic()
    with caplog.at_level(logging.DEBUG):
        sink.close(1.0)

    assert time.monotonic() - began < 5  # of a hanging request's 10 s
    counts = sink.counters()
    assert counts["sent_points"] == 0
    assert counts["failed_exports"] >= 1
    assert counts["unsent_points"] > 0
    assert not [t for t in set(threading.enumerate()) - before if "otlp" in t.name]
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([record for record in said if "metrics cannot be sent" in record.message]) <= 1


def test_outage_and_return_are_said_once(
    protocol: str,
    receiver: OtlpReceiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """After an outage metrics arrive again; nothing of the outage is sent late."""
    monkeypatch.setenv("OTEL_METRIC_EXPORT_INTERVAL", "20")
    receiver.behave(Behaviour.THROTTLE)
    with caplog.at_level(logging.DEBUG):
        sink = sink_from_environment()
        wait_until(lambda: sink.counters()["failed_exports"] >= 3)
        receiver.behave(Behaviour.OK)
        wait_until(lambda: "takes metrics again" in caplog.text)
    sink.close(5)
    said = [record for record in caplog.records if record.levelno >= logging.WARNING]

    assert [record.name for record in said] == ["stagescope.exporters.otlp.sending"] * 2
    assert "OTEL_METRICS_EXPORTER=none sends none" in said[0].getMessage()
    assert sink.counters()["sent_points"] == len(receiver.points)


def test_a_fault_of_our_own_is_counted(
    protocol: str, receiver: OtlpReceiver, caplog: pytest.LogCaptureFixture
) -> None:
    """What cannot be gathered is said and ends nothing."""

    def fails() -> Shown:
        raise RuntimeError("a planted fault")

    sink = sink_from_environment(fails)
    sink.close(5)

    assert sink.counters()["failed_exports"] == 1
    assert receiver.points == []


def test_nothing_to_send_sends_nothing(protocol: str, receiver: OtlpReceiver) -> None:
    """Without a request or a sample no back end is asked."""
    sink = otlp_metrics_from_environment(StageMetrics(), Shown)
    assert sink is not None
    sink.close(5)

    assert receiver.attempts == 0


@pytest.mark.parametrize(
    ("environ", "sends"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1"}, True),
        ({"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": "http://127.0.0.1:1/v1/metrics"}, True),
        ({"OTEL_METRICS_EXPORTER": "otlp"}, True),
        ({"OTEL_METRICS_EXPORTER": "otlp,prometheus"}, True),
        ({"OTEL_METRICS_EXPORTER": "prometheus"}, False),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:1/v1/traces"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_METRICS_EXPORTER": "none"},
         False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:1", "OTEL_SDK_DISABLED": "true"},
         False),
    ],
)  # fmt: skip
def test_it_sends_where_it_is_asked_to(
    environ: dict[str, str], sends: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An endpoint or the exporter's name asks for it; `none` and a disabled SDK switch it off."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    sink = otlp_metrics_from_environment(StageMetrics(), Shown)
    if sink:
        sink.close(1)

    assert (sink is not None) == sends


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("OTEL_METRICS_EXPORTER", "statsd"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "often"),
        ("OTEL_METRIC_EXPORT_INTERVAL", "0"),
        ("OTEL_EXPORTER_OTLP_METRICS_PROTOCOL", "udp"),
        ("OTEL_EXPORTER_OTLP_METRICS_COMPRESSION", "brotli"),
        ("OTEL_EXPORTER_OTLP_METRICS_TIMEOUT", "soon"),
        ("OTEL_EXPORTER_OTLP_METRICS_ENDPOINT", "http://127.0.0.1:port"),
    ],
)
def test_bad_variable_is_refused(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A value that cannot be used is refused at the start, in a sentence that shows it."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    with pytest.raises(UsageError, match=value):
        otlp_metrics_from_environment(StageMetrics(), Shown)
