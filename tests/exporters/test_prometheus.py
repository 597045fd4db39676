"""What is counted, how it reads as Prometheus and OpenMetrics text, and how it is served."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from urllib.request import Request, urlopen

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client import Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_text
from prometheus_client.samples import Sample

from stagescope.agent.api.address import url
from stagescope.agent.api.control import listen, metrics_only
from stagescope.exporters.aggregation import WINDOW, Histogram
from stagescope.exporters.prometheus import AgentFigures, StageMetrics
from stagescope.exporters.tail_sampling import Share, TailSampler
from stagescope.recorder.format import WAITS
from stagescope.semconv import METRICS
from stagescope.stages import StageStall, WaitFact
from stagescope.testing.records import (
    PROCESS,
    SPAN_ID,
    TRACE_ID,
    batch_record,
    cold_start_record,
    request_record,
    stage_spans,
)
from stagescope.testing.records import (
    WAITS as WAIT_FACTS,
)

OPENMETRICS = "application/openmetrics-text; version=1.0.0"


def families(metrics: StageMetrics) -> dict[str, Metric]:
    """Render as OpenMetrics and read it back."""
    text, _ = metrics.render(OPENMETRICS)
    return {family.name: family for family in read_openmetrics(text)}


def read_openmetrics(text: bytes) -> Iterator[Metric]:
    """Read by prometheus_client's parser, which knows more than it says in types."""
    return openmetrics(text.decode())  # type: ignore[no-untyped-call,no-any-return]


def samples(family: Metric, suffix: str, **labels: str) -> list[Sample]:
    return [
        sample
        for sample in family.samples
        if sample.name == family.name + suffix and labels.items() <= sample.labels.items()
    ]


def counted(*records: object) -> StageMetrics:
    metrics = StageMetrics()
    metrics.accept(records)  # type: ignore[arg-type]
    return metrics


def test_stage_seconds_add_up() -> None:
    """Each stage is counted once with its sub-stages in it; all stages sum to the request."""
    read = families(counted(request_record()))
    stages = read["model_server_stage_duration_seconds"]
    sums = {s.labels["stage"]: s.value for s in samples(stages, "_sum")}
    counts = {s.labels["stage"]: s.value for s in samples(stages, "_count")}

    assert sums == pytest.approx(
        {"queue": 0.0002, "preprocess": 0.0008, "batch": 0.001, "inference": 0.007,
         "postprocess": 0.0005, "respond": 0.0004, "other": 0.0001}
    )  # fmt: skip
    assert set(counts.values()) == {1}
    (whole,) = samples(read["http_server_request_duration_seconds"], "_sum")
    assert sum(sums.values()) == pytest.approx(whole.value)


def test_stages_and_sub_stages_are_told_by_route() -> None:
    """What one route needs for a stage is not mixed with another's; sub-stages by full name."""
    fast = stage_spans((("queue.threadpool", 0, 1_000_000), ("inference", 1_000_000, 3_000_000)),
                       3_000_000)  # fmt: skip
    read = families(counted(request_record(), request_record(route="/fast", stages=fast)))

    def sums(metric: str, label: str, route: str) -> dict[str, float]:
        return {s.labels[label]: s.value for s in samples(read[metric], "_sum", route=route)}

    stages = "model_server_stage_duration_seconds"
    assert sums(stages, "stage", "/predict")["inference"] == pytest.approx(0.007)
    assert sums(stages, "stage", "/fast")["inference"] == pytest.approx(0.002)
    parts = "model_server_sub_stage_duration_seconds"
    assert sums(parts, "sub_stage", "/predict") == pytest.approx(
        {"queue.threadpool": 0.0001, "queue.batch": 0.0001, "batch.wait": 0.0009}
    )
    assert sums(parts, "sub_stage", "/fast") == pytest.approx({"queue.threadpool": 0.001})


def test_workers_are_told_apart() -> None:
    """The mean request of each process of a service, by its pid."""
    other = replace(PROCESS, pid=4243, ring_id="cd" * 16)
    slow = request_record(process=other, duration_ns=90_000_000)
    read = families(counted(request_record(), request_record(), slow))
    workers = read["model_server_worker_request_duration_seconds"]

    sums = {s.labels["worker"]: s.value for s in samples(workers, "_sum")}
    counts = {s.labels["worker"]: s.value for s in samples(workers, "_count")}
    assert sums == pytest.approx({"4242": 0.02, "4243": 0.09})
    assert counts == {"4242": 2, "4243": 1}


def test_the_share_under_200_ms_can_be_asked_for() -> None:
    """There are buckets from 100 to 250 ms in small steps, of requests and of stages."""
    read = families(
        counted(*(request_record(duration_ns=ms * 1_000_000) for ms in (90, 199, 200, 201, 240)))
    )
    requests = read["http_server_request_duration_seconds"]
    seconds = {float(s.labels["le"]): s.value for s in samples(requests, "_bucket")}

    assert [seconds[le] for le in (0.1, 0.125, 0.15, 0.175, 0.2, 0.25)] == [1, 1, 1, 1, 3, 5]
    stages = samples(read["model_server_stage_duration_seconds"], "_bucket")
    assert {float(s.labels["le"]) for s in stages} == set(seconds)


def test_a_process_figure_has_one_family_in_seconds() -> None:
    """The agent's own counters do not show a second time what `model_server_process_*` shows."""
    both = dict.fromkeys(WAITS, 2_000_000_000)
    figures = AgentFigures(
        counters=lambda: both, gauges=lambda: both, waits=lambda: {"resnet-api": both}
    )
    text, _ = StageMetrics(figures=figures).render()
    shown = {family.name for family in plain_text(text.decode())}

    assert not [name for name in shown if name.startswith("stagescope_")]
    assert b'model_server_process_gc_pause_seconds_total{service="resnet-api"} 2.0' in text
    assert b'model_server_process_pool_busy_seconds_total{service="resnet-api"} 2.0' in text
    assert not [name for name in shown if name.endswith(("_ns", "_ms"))]


def test_own_time_and_waits_of_a_load_run_sum_to_its_stages() -> None:
    """Requests of a load run have both histograms, others neither; a wait of 0 is not counted."""
    run = request_record(run_id="r1", wait_facts=WAIT_FACTS)
    not_watched = request_record(run_id="r2", wait_facts=WAIT_FACTS[4:])
    read = families(counted(run, request_record(), not_watched))
    own = {s.labels["stage"]: s for s in samples(read["model_server_stage_own_seconds"], "_sum")}
    waits = {
        (s.labels["stage"], s.labels["cause"]): s.value
        for s in samples(read["model_server_stage_wait_seconds"], "_sum")
    }

    assert waits == pytest.approx(
        {("preprocess", "cpu"): 0.0002, ("inference", "event_loop"): 0.003,
         ("inference", "gc"): 0.001, ("respond", "stopped"): 0.0001}
    )  # fmt: skip
    assert own["inference"].value == pytest.approx(0.003)
    assert own["inference"].labels == {"service": "resnet-api", "stage": "inference"}
    assert sum(s.value for s in own.values()) + sum(waits.values()) == pytest.approx(0.01)
    counts = samples(read["model_server_stage_own_seconds"], "_count")
    assert {sample.value for sample in counts} == {1}


def test_request_labels_are_bounded_words() -> None:
    """Route template, known method, class of the status; never the path."""
    read = families(
        counted(
            request_record(),
            request_record(route="", path="/secret/42", status=404),
            request_record(method="BREW", status=0),
            request_record(error="LookupError", status=500),
        )
    )["http_server_request_duration_seconds"]
    labels = [s.labels for s in samples(read, "_count")]

    assert labels == [
        {"service": "resnet-api", "method": "POST", "route": "/predict", "status": "2xx"},
        {"service": "resnet-api", "method": "POST", "route": "", "status": "4xx"},
        {"service": "resnet-api", "method": "_OTHER", "route": "/predict", "status": "none"},
        {"service": "resnet-api", "method": "POST", "route": "/predict", "status": "5xx"},
    ]


def test_exemplars_point_at_traces() -> None:
    """A bucket's exemplar is the newest request in it, with its ids, its value and its time."""
    older, newer = request_record(trace_id="cc" * 16), request_record()
    read = families(counted(older, newer))
    found = [
        sample.exemplar
        for sample in samples(
            read["model_server_stage_duration_seconds"], "_bucket", stage="inference"
        )
        if sample.exemplar
    ]

    assert [exemplar.labels for exemplar in found] == [{"trace_id": TRACE_ID, "span_id": SPAN_ID}]
    assert found[0].value == 0.007
    assert float(found[0].timestamp or 0) == 1_700_000_001.01


def test_exemplars_only_where_the_trace_is_kept() -> None:
    """Where the keep policy is given, no exemplar leads to a trace that was not sent."""
    policy = TailSampler(Share(0.0, 0.0, 0.0))
    metrics = StageMetrics(has_trace=policy.certain)
    metrics.accept([request_record(), request_record(run_id="r1", trace_id="dd" * 16)])
    read = families(metrics)["http_server_request_duration_seconds"]
    traces = {s.exemplar.labels["trace_id"] for s in read.samples if s.exemplar}

    assert traces == {"dd" * 16}
    assert [s.value for s in samples(read, "_count")] == [2]


def test_batches_in_flight_and_own_counts() -> None:
    """Batch sizes and seconds by model, requests in flight, the agent's counts as they are now."""
    drops = {"otlp.dropped_full_spans": 3}
    metrics = StageMetrics(
        figures=AgentFigures(
            lambda: drops, lambda: {"otlp.queued_spans": 7}, lambda: {"resnet-api": 4}
        )
    )
    metrics.accept([batch_record(size=6), batch_record(size=8)])
    drops["otlp.dropped_full_spans"] = 5
    read = families(metrics)

    (size,) = samples(read["model_server_batch_size"], "_sum", model="resnet50")
    (seconds,) = samples(read["model_server_batch_duration_seconds"], "_sum")
    assert (size.value, seconds.value) == (14, 0.016)
    assert read["http_server_active_requests"].samples[0].value == 4
    assert read["stagescope_otlp_dropped_full_spans"].samples[0].value == 5
    assert read["stagescope_otlp_queued_spans"].samples[0].value == 7


def test_metrics_are_in_the_table() -> None:
    """What is shown is what the published table names, with its labels and units."""
    stalled = request_record(
        stalls=(StageStall(3, "inference", "gc", 1_000_000),), wait_facts=WAIT_FACTS
    )
    figures = AgentFigures(
        in_flight=lambda: {"resnet-api": 1}, waits=lambda: {"resnet-api": dict.fromkeys(WAITS, 1)}
    )
    metrics = StageMetrics(figures=figures)
    metrics.accept([stalled, batch_record(), cold_start_record()])
    read = families(metrics)

    assert set(read) == {named.prometheus for named in METRICS}
    for named in METRICS:
        family = read[named.prometheus]
        assert family.type == named.type
        assert set(family.samples[0].labels) - {"le"} == set(named.labels)
        assert family.unit == ("seconds" if named.unit == "s" else "")


def test_profiled_requests_are_counted_apart() -> None:
    """A request that overlaps a capture is in no histogram, and in a counter of its own."""
    profiled = request_record(stalls=(StageStall(0, "inference", "capture", 1_000_000),))
    read = families(counted(request_record(), profiled, profiled))

    (whole,) = samples(read["http_server_request_duration_seconds"], "_count")
    assert whole.value == 1
    (apart,) = samples(read["model_server_profiled_requests"], "_total")
    assert (apart.labels, apart.value) == ({"service": "resnet-api"}, 2)


def test_a_cold_start_is_counted_until_ready_first_request_and_steady() -> None:
    """Ready after two seconds, answered after three; steady once two windows agree."""
    metrics = counted(cold_start_record())
    slow_then_steady = [30_000_000] * WINDOW + [10_000_000] * WINDOW + [10_400_000] * WINDOW
    at_ns = 7_000_000_000
    for duration_ns in slow_then_steady:
        metrics.accept([request_record(start_ns=at_ns, duration_ns=duration_ns, stages=())])
        at_ns += duration_ns
    until = {s.labels["until"]: s.value for s in
             families(metrics)["model_server_cold_start_duration_seconds"].samples
             if s.name.endswith("_sum")}  # fmt: skip

    assert until["ready"] == 2.0
    assert until["first_request"] == 3.0
    # From 3.01 s on the clock until the end of the second window.
    assert until["steady"] == pytest.approx(7.0 + 20 * 0.040 - 3.01)


def test_format_goes_by_the_accept_header() -> None:
    """Without an Accept header it is Prometheus's text, without exemplars; as asked, OpenMetrics."""
    metrics = counted(request_record())
    text, content_type = metrics.render()
    open_text, open_type = metrics.render(OPENMETRICS)

    assert content_type.startswith("text/plain; version=0.0.4")
    assert b"trace_id" not in text
    assert len(list(plain_text(text.decode()))) == len(METRICS)
    assert open_type.startswith("application/openmetrics-text; version=1.0.0")
    assert open_text.endswith(b"# EOF\n")
    assert b"trace_id" in open_text
    assert metrics.render(OPENMETRICS.replace("application/open", "Application/Open")) == (
        open_text,
        open_type,
    )


def test_names_without_end_are_bounded() -> None:
    """Stages, routes, models and services that are invented without end count as `other`."""
    stage = request_record().stages[0]
    serving = dict.fromkeys((f"s{index}" for index in range(200)), 1)
    metrics = StageMetrics(figures=AgentFigures(in_flight=lambda: serving))
    for index in range(1_000):
        own = (stage._replace(stage=f"mine{index}.part", start_ns=0, end_ns=10, self_ns=10),)
        waited = (WaitFact("ready", 0, 2, 6),)
        metrics.accept(
            [request_record(stages=own, duration_ns=10, route=f"/{index}", wait_facts=waited)]
        )
        metrics.accept([batch_record(model=f"m{index}")])
    for index in range(200):
        metrics.accept([request_record(process=replace(PROCESS, service=f"s{index}"))])
    read = families(metrics)
    stages = samples(read["model_server_stage_duration_seconds"], "_sum", service="resnet-api")

    assert len({s.labels["stage"] for s in stages}) == 48
    assert len({s.labels["route"] for s in stages}) == 51
    for name, each in (("own", 6e-9), ("wait", 4e-9)):
        series = samples(read[f"model_server_stage_{name}_seconds"], "_sum", service="resnet-api")
        assert len({s.labels["stage"] for s in series}) <= 48
        assert sum(s.value for s in series) == pytest.approx(each * 1_000)
    parts = samples(read["model_server_sub_stage_duration_seconds"], "_sum", service="resnet-api")
    assert len({s.labels["sub_stage"] for s in parts}) <= 48
    assert sum(s.value for s in stages) == pytest.approx(10e-9 * 1_000)
    requests = read["http_server_request_duration_seconds"]
    assert len(samples(requests, "_count", service="resnet-api")) == 200
    assert sum(s.value for s in samples(requests, "_count")) == 1_200
    assert len(samples(read["model_server_batch_size"], "_count")) == 65
    assert len({s.labels["service"] for s in samples(requests, "_count")}) == 65


@given(st.lists(st.integers(0, 10**11), min_size=1))
def test_histogram_counts_as_its_bounds_say(values: list[int]) -> None:
    """Each bucket holds the values above the bound before it and up to its own."""
    histogram = Histogram((10, 1_000, 10**9))
    for value in values:
        histogram.add(value)
    edges = (-1, *histogram.bounds, 10**12)

    assert histogram.total == sum(values)
    assert histogram.counts == [
        sum(low < value <= high for value in values) for low, high in pairwise(edges)
    ]


def test_served_over_http() -> None:
    """A scrape of an agent's port gets the text, in the format that it asks for."""
    server = listen(("127.0.0.1", 0), metrics_only(counted(request_record()).render))
    asked = Request(url("127.0.0.1", server.port, "/metrics"), headers={"Accept": OPENMETRICS})
    with urlopen(asked) as answer:
        assert answer.headers["Content-Type"].startswith("application/openmetrics-text")
        read = {family.name for family in read_openmetrics(answer.read())}
    server.stop()
    assert "model_server_stage_duration_seconds" in read
