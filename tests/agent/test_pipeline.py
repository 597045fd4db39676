"""What an agent shows as metrics: its sinks, its samples, its own numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families as plain_text

from stagescope.agent.collectors import PeriodicTask
from stagescope.agent.loop import Agent
from stagescope.agent.pipeline import sinks_from_environment
from stagescope.testing.spool import short_spool
from tests.support.otlp import OtlpReceiver
from tests.support.rings import write_ring


@pytest.fixture
def spool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A spool; and faults of our own are raised."""
    monkeypatch.setenv("STAGESCOPE_RAISE", "1")
    with short_spool() as folder:
        yield folder


def test_an_agents_metrics_hold_its_samples_and_its_collectors(spool: Path) -> None:
    """Samples are families of their own, and no collector's name is in the name of a metric."""
    composed = sinks_from_environment({})
    agent = Agent(
        spool, composed.sinks, samplers=lambda _: [PeriodicTask("calls", 1.0, lambda: None)]
    )
    composed.watch(agent)
    with write_ring(spool / "a.ring", 1):
        agent.step()
        text = composed.render("")[0].decode()
    counters = agent.counters()
    agent.close()
    found: dict[str, Metric] = {family.name: family for family in plain_text(text)}

    cpu = found["stagescope_collector_cpu_time_seconds"].samples
    assert {"calls", "discover", "other"} <= {sample.labels["collector"] for sample in cpu}
    calls = {s.labels["collector"]: s.value for s in found["stagescope_collector_calls"].samples}
    assert calls["calls"] == 1
    assert counters["collector_calls_calls"] == 1
    assert not [name for name in found if name.startswith("stagescope_collector_calls_")]


def test_spans_and_metrics_go_where_the_environment_says(
    spool: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One endpoint takes both; a short life of an agent sends its metrics at its end."""
    with OtlpReceiver() as receiver, write_ring(spool / "a.ring", 3, run_id="run"):
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
        composed = sinks_from_environment()
        agent = Agent(spool, composed.sinks)
        composed.watch(agent)
        agent.step()
        agent.close(10)
        found = {point.name for point in receiver.points}

        assert len([span for span in receiver.spans if span.kind == "server"]) == 3
        assert {"http.server.request.duration", "stagescope.collector.cpu_time"} <= found
        assert agent.counters()["otlp_metrics_sent_points"] == len(receiver.points)


@pytest.mark.parametrize(
    ("variable", "value", "left"),
    [
        ("OTEL_METRIC_EXPORT_INTERVAL", "often", {"metrics", "otlp"}),
        ("OTEL_TRACES_SAMPLER", "xray", {"metrics", "otlp_metrics"}),
        ("OTEL_TRACES_EXPORTER", "zipkin,otlp", {"metrics", "otlp_metrics"}),
        ("OTEL_EXPORTER_OTLP_PROTOCOL", "udp", {"metrics"}),
    ],
)
def test_a_variable_that_is_not_supported_turns_off_its_sink_alone(
    variable: str,
    value: str,
    left: set[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A value that is the app's own costs one sink and one sentence, never the agent."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:1")
    monkeypatch.setenv(variable, value)
    composed = sinks_from_environment()
    for sink in composed.sinks.values():
        sink.close(0.2)

    assert set(composed.sinks) == left
    assert f"{variable}={value!r}" in caplog.text
