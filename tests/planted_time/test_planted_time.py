"""A seeded choice of the planted servers: the report finds each stage's own time, and the cause.

`make planted-time` runs them all. A stage's time is measured in the server, so that what a busy
machine takes away must come out as a wait.
"""

from __future__ import annotations

import os
import random
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import pytest

from stagescope.semconv import (
    LOAD_RUN_ID,
    METRIC_STAGE_OWN,
    METRIC_STAGE_WAIT,
    STAGE,
    STAGE_OWN_NS,
    STAGE_SELF_NS,
    STAGE_WAITS,
    WAIT_CAUSE,
)
from stagescope.testing import wait_until
from tests.planted_time.planted import LOOPS, SHAPES, Outcome, Shape, lines, outcome, served
from tests.support.otlp import OtlpReceiver, ReceivedSpan
from tests.support.otlp_points import ReceivedPoint

_choice = random.Random(int(os.environ.get("PLANTED_SEED", "1")))
_ON_THE_LOOP = ("child_task", "task_group", "in_steps", "postprocess_holds")
CHOSEN = [("blocking", 0.8), *((path, 0.3) for path in _choice.sample(_ON_THE_LOOP, 2))]


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    """What the agents send their spans and metrics to."""
    with OtlpReceiver() as receiver, pytest.MonkeyPatch.context() as environment:
        environment.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.http_endpoint)
        environment.setenv("OTEL_METRIC_EXPORT_INTERVAL", "500")
        yield receiver


@pytest.fixture(scope="module", params=LOOPS)
def server(
    request: pytest.FixtureRequest, receiver: OtlpReceiver
) -> Iterator[tuple[str, tuple[int, Path]]]:
    """The servers on one of the loops."""
    with served(request.param) as place:
        yield request.param, place


def run(server: tuple[str, tuple[int, Path]], path: str, load: float, folder: Path) -> Outcome:
    """Load one of them, and print what was found beside what is true."""
    loop, place = server
    (shape,) = (shape for shape in SHAPES if shape.path == path)
    found = outcome(place, loop, shape, load, folder / "run")
    print("\n".join(lines(found)))
    return found


@pytest.fixture(scope="module")
def headline(
    server: tuple[str, tuple[int, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Outcome:
    """What was found where preprocess computes on the loop, of 1.5 times the server's capacity."""
    return run(server, "headline", 1.5, tmp_path_factory.mktemp("headline"))


@pytest.mark.parametrize(("path", "load"), CHOSEN)
def test_each_stage_takes_itself_what_was_measured_in_the_server(
    server: tuple[str, tuple[int, Path]], path: str, load: float, tmp_path: Path
) -> None:
    """The median of own time is the true one, and all rows sum to the latency."""
    found = run(server, path, load, tmp_path)
    report = found.report

    assert found.stages
    for stage in found.stages:
        margin = max(0.3 * stage.true_p50, 3.0)
        assert abs(stage.p50 - stage.true_p50) <= margin, stage
    assert report.total is not None
    waits = [wait.mean_ms for wait in report.waits if wait.cause not in ("threadpool", "batch")]
    rows = [part.mean_ms if part.own is None else part.own.mean_ms for part in report.parts]
    assert sum(rows) + sum(waits) == pytest.approx(report.total.mean_ms, rel=1e-9)


def test_the_wait_is_the_event_loops_and_preprocess_held_it(headline: Outcome) -> None:
    """Where preprocess computes on the loop, the report says event loop, and by whom it was held."""
    found = headline

    (wait,) = [wait for wait in found.report.waits if wait.cause == "event_loop"]
    assert wait.mean_ms + found.machine_ms + found.wait_ms("gc") >= 0.8 * found.waited_ms
    assert wait.low_ms <= wait.mean_ms <= wait.high_ms
    by_stage = {holder.stage: holder.share for holder in wait.held_by}
    assert max(by_stage, key=lambda stage: by_stage[stage]) == "preprocess"
    assert found.network_ms <= max(5.0, 0.1 * found.waited_ms)


def test_what_is_exported_of_a_load_run_tells_own_time_and_waits_apart(
    headline: Outcome, receiver: OtlpReceiver
) -> None:
    """A back end gets the loop's waits of the report on the spans, and as histograms."""
    report = headline.report

    def spans_of_the_run() -> dict[str, list[ReceivedSpan]]:
        spans = receiver.spans
        traces = {s.trace_id for s in spans if s.attributes.get(LOAD_RUN_ID) == report.run.run_id}
        by_name = defaultdict(list)
        for span in spans:
            if span.trace_id in traces:
                by_name[span.name].append(span)
        return by_name

    answered = report.client.answered
    wait_until(lambda: len(spans_of_the_run()["inference"]) == answered, 20)
    told = [span.attributes for span in spans_of_the_run()["inference"]]
    inference = report.part("inference")
    assert inference is not None
    assert inference.own is not None
    waited_ms = fmean(each.get(STAGE_WAITS["event_loop"], 0) for each in told) / 1e6
    assert waited_ms >= 0.7 * inference.own.waits["event_loop"]
    for each in told:
        waits = [each.get(name, 0) for name in STAGE_WAITS.values()]
        assert each[STAGE_OWN_NS] + sum(waits) == each[STAGE_SELF_NS]

    def histogram(name: str, cause: str | None) -> list[ReceivedPoint]:
        return [
            point
            for point in receiver.points
            if point.name == name
            and point.attributes[STAGE] == "inference"
            and point.attributes.get(WAIT_CAUSE) == cause
        ]

    wait_until(lambda: bool(histogram(METRIC_STAGE_WAIT, "event_loop")), 20)
    assert histogram(METRIC_STAGE_OWN, None)


def test_a_process_that_was_stopped_waits_for_that_and_not_for_its_loop(
    server: tuple[str, tuple[int, Path]], tmp_path: Path
) -> None:
    """SIGSTOP for 1.2 s: whoever was in flight, or was sent meanwhile, waited for the process."""
    loop, place = server
    found = outcome(place, loop, Shape("stopping", 100.0, "stopped"), 0.5, tmp_path / "run")
    print("\n".join(lines(found)))

    (wait,) = [wait for wait in found.report.waits if wait.cause == "stopped"]
    assert 0.9e3 <= wait.p99_ms <= 1.4e3
    # Who came after it waits for the loop, behind those it held up: the longer the busier it is.
    others = found.machine_ms + found.wait_ms("gc")
    assert wait.mean_ms >= 0.5 * (found.waited_ms - others)
