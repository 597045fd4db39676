"""Samples and collectors' cost as Prometheus reads them."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from prometheus_client import CollectorRegistry, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from stagescope.exporters.prometheus import CostCollector, SampleCollector
from stagescope.exporters.sample_series import Series, Shown
from stagescope.sample_names import SAMPLE_NAMES
from stagescope.samples import AMOUNT, LEVEL, SampleName
from stagescope.semconv import (
    COLLECTOR_METRICS,
    METRICS,
    prometheus_label,
    prometheus_name,
    prometheus_unit,
)
from tests.support.evidence import sample

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def read(shown: Shown, costs: Mapping[str, Mapping[str, float]] | None = None) -> dict[str, Metric]:
    """Render in both formats, and give what OpenMetrics's strict parser reads."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(SampleCollector(lambda: shown))
    registry.register(CostCollector(lambda: costs or {}))
    assert list(plain_text(choose_encoder("")[0](registry).decode()))
    text = choose_encoder(OPENMETRICS)[0](registry).decode()
    return {one.name: one for one in openmetrics(text)}  # type: ignore[no-untyped-call]


def series(named: SampleName, service: str = "", total: float = 0.0, **changes: object) -> Series:
    return Series(named, sample(name=named.name, **changes), total, service)


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (SampleName("process.cpu.time", "s", AMOUNT, ""), "process_cpu_time_seconds"),
        (SampleName("process.memory.usage", "By", LEVEL, ""), "process_memory_usage_bytes"),
        (SampleName("system.cpu.utilization", "1", LEVEL, ""), "system_cpu_utilization_ratio"),
        (SampleName("process.thread.count", "{thread}", LEVEL, ""), "process_thread_count"),
        (SampleName("process.paging.faults", "{fault}", AMOUNT, ""), "process_paging_faults"),
        (SampleName("some.count", "1", AMOUNT, ""), "some_count"),
        (SampleName("hw.power", "W", LEVEL, ""), "hw_power_watts"),
        (SampleName("hw.energy", "J", AMOUNT, ""), "hw_energy_joules"),
        (SampleName("hw.temperature", "Cel", LEVEL, ""), "hw_temperature_celsius"),
        (SampleName("hw.pcie.rate", "By/s", LEVEL, ""), "hw_pcie_rate_bytes_per_second"),
        (SampleName("rate.of-faults", "{fault}/s", LEVEL, ""), "rate_of_faults_per_second"),
        (SampleName("already.seconds", "s", AMOUNT, ""), "already_seconds"),
    ],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_names_are_converted_by_opentelemetrys_rules(named: SampleName, expected: str) -> None:
    """Unit words at the end, once; annotations in braces give none; amounts get `_total`."""
    found = read(Shown((series(named, detail=""),)))[expected]

    assert prometheus_name(named) == expected
    assert found.type == ("gauge" if named.kind == LEVEL else "counter")
    assert found.unit == prometheus_unit(named)
    assert found.samples[0].name == expected + ("" if named.kind == LEVEL else "_total")


def test_labels_that_a_series_has_no_value_of_are_left_out() -> None:
    """Service and pid of a process, the device's UUID, the detail under its attribute's name."""
    time = SampleName("process.cpu.time", "s", AMOUNT, "CPU.", detail="cpu.mode")
    stage = SampleName("stage.time", "s", AMOUNT, "Device.", detail="model_server.stage")
    found = read(
        Shown((
            series(time, "api", 2.5, pid=7, detail="user"),
            series(time, "", 1.5, pid=8, detail="user"),
            series(stage, "api", 3.0, pid=7, device="GPU-1", detail="inference"),
        ))
    )  # fmt: skip
    of_time = [(s.labels, s.value) for s in found["process_cpu_time_seconds"].samples]

    assert of_time == [
        ({"service": "api", "pid": "7", "cpu_mode": "user"}, 2.5),
        ({"pid": "8", "cpu_mode": "user"}, 1.5),
    ]
    (of_stage,) = found["stage_time_seconds"].samples
    assert of_stage.labels == {
        "service": "api", "pid": "7", "device": "GPU-1", "stage": "inference",
    }  # fmt: skip


def test_collectors_have_families_of_their_own() -> None:
    """Calls, lateness and the longest call stand under the collector's name."""
    host = {"calls": 5, "cpu_s": 0.5, "late_s": 0.25, "longest_s": 0.125}
    found = read(Shown(left_out=3), {"host": host, "gpu": host | {"calls": 6}})

    assert {metric.prometheus for metric in COLLECTOR_METRICS} == set(found)
    assert {metric.prometheus: metric.type for metric in COLLECTOR_METRICS} == {
        name: family.type for name, family in found.items()
    }
    calls = {s.labels["collector"]: s.value for s in found["stagescope_collector_calls"].samples}
    assert calls == {"host": 5, "gpu": 6}
    assert found["stagescope_collector_late_seconds"].samples[0].value == 0.25
    assert found["stagescope_collector_longest_seconds"].samples[0].value == 0.125
    assert found["stagescope_samples_series_left_out"].samples[0].value == 3


def test_no_two_metrics_have_one_name_in_prometheus() -> None:
    """Names that differ only in their dots or units would be one family."""
    all_names = [metric.prometheus for metric in (*METRICS, *COLLECTOR_METRICS)]
    all_names += map(prometheus_name, SAMPLE_NAMES)

    assert len(set(all_names)) == len(all_names)
    assert len({named.name for named in SAMPLE_NAMES}) == len(SAMPLE_NAMES)


def test_every_published_name_is_well_formed() -> None:
    """Each name of a sample can be shown, with a document and a label that Prometheus takes."""
    every = Shown(tuple(series(named) for named in SAMPLE_NAMES))
    found = read(every)

    assert set(map(prometheus_name, SAMPLE_NAMES)) <= set(found)
    assert all(named.doc and named.unit and named.kind in (LEVEL, AMOUNT) for named in SAMPLE_NAMES)
    assert all(
        prometheus_label(named.detail).isidentifier() for named in SAMPLE_NAMES if named.detail
    )
