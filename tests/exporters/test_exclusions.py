"""Requests that are left out of traces, and of metrics where that is wished."""

from __future__ import annotations

import logging

import pytest

from stagescope.agent.pipeline import sinks_from_environment
from stagescope.errors import UsageError
from stagescope.exporters.exclusions import exclusions_from_environment
from stagescope.exporters.tail_sampling import Share, TailSampler
from stagescope.testing.records import request_record

OURS, THEIRS = "STAGESCOPE_EXCLUDED_URLS", "OTEL_PYTHON_EXCLUDED_URLS"
PROBE = request_record(path="/healthz", route="/healthz")


@pytest.mark.parametrize(
    ("environ", "left_out"),
    [
        ({}, []),
        ({THEIRS: "healthz,metrics"}, ["/healthz", "/metrics", "/v2/healthz/x"]),
        ({OURS: "^/healthz$"}, ["/healthz"]),
        ({OURS: "^/healthz$", THEIRS: " metrics "}, ["/healthz", "/metrics"]),
    ],
)
def test_what_is_left_out(environ: dict[str, str], left_out: list[str]) -> None:
    """Regular expressions of both variables are searched in the path, as OpenTelemetry does."""
    exclusions = exclusions_from_environment(environ)
    paths = ["/healthz", "/metrics", "/v2/healthz/x", "/predict"]

    assert [path for path in paths if exclusions.no_trace(request_record(path=path))] == left_out


def test_neither_errors_nor_the_floor_bring_one_back() -> None:
    """A probe has no trace whatever becomes of it; a load run's requests have theirs."""
    excluded = exclusions_from_environment({OURS: "healthz"})
    policy = TailSampler(Share(1.0, 1.0, 1.0), excluded=excluded)
    failed = request_record(path="/healthz", status=500)

    assert policy.kept(failed) is None
    assert not policy.certain(failed)
    assert policy.kept(request_record(path="/healthz", run_id="r1"))
    assert policy.kept(request_record())


@pytest.mark.parametrize(("left_out_of", "counted"), [("", 2), ("traces", 2), ("metrics", 1)])
def test_metrics_count_them_unless_told_otherwise(left_out_of: str, counted: int) -> None:
    """Metrics see every request; `STAGESCOPE_EXCLUDED_FROM=metrics` takes the excluded out."""
    pipeline = sinks_from_environment({OURS: "healthz", "STAGESCOPE_EXCLUDED_FROM": left_out_of})
    pipeline.sinks["metrics"].accept([PROBE, request_record()])
    text = pipeline.render("")[0].decode()
    counts = [
        float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("http_server_request_duration_seconds_count")
    ]

    assert sum(counts) == counted
    assert pipeline.sinks["metrics"].accepted == 2


def test_what_is_no_expression_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """The sentence names the variable and the pattern; the agent goes on and excludes nothing."""
    with pytest.raises(UsageError, match=f"{OURS}: .* is no regular expression"):
        exclusions_from_environment({OURS: "health(z"})
    with caplog.at_level(logging.WARNING):
        sinks_from_environment({OURS: "health(z"}).sinks["metrics"].accept([PROBE])
    assert f"no request is excluded: {OURS}" in caplog.text
