"""A real Prometheus scrapes us and gives our exemplars back.

Needs the program `prometheus` (Debian: `apt-get install -y prometheus`), so it is not part of
`make test`; `make test-system` runs it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from stagescope.agent.api.control import listen, metrics_only
from stagescope.exporters.prometheus import StageMetrics
from stagescope.testing import wait_until
from stagescope.testing.records import TRACE_ID, batch_record, request_record

pytestmark = pytest.mark.system


@pytest.fixture
def metrics() -> Iterator[tuple[StageMetrics, str]]:
    """Our own endpoint, with the `host:port` it listens on."""
    metrics = StageMetrics()
    server = listen(("127.0.0.1", 0), metrics_only(metrics.render))
    yield metrics, f"127.0.0.1:{server.port}"
    server.stop()


@pytest.fixture
def prometheus(metrics: tuple[StageMetrics, str], start_prometheus: Callable[[str], str]) -> str:
    """Return the URL of a Prometheus that scrapes our endpoint."""
    return start_prometheus(metrics[1])


def ask(url: str, path: str, **parameters: str | float) -> list[dict[str, Any]]:
    """Return the data of an API answer; empty while there is none."""
    with suppress(URLError), urlopen(f"{url}{path}?{urlencode(parameters)}") as answer:
        data = json.load(answer)["data"]
        return data["result"] if isinstance(data, dict) else data  # type: ignore[no-any-return]
    return []


def test_prometheus_reads_us(metrics: tuple[StageMetrics, str], prometheus: str) -> None:
    """Prometheus stores our histograms and, by its exemplar API, gives the trace id back."""
    metrics[0].accept([request_record(), batch_record()])
    name = "model_server_stage_duration_seconds"
    query = f'{name}_bucket{{stage="inference"}}'
    exemplars = wait_until(
        lambda: ask(prometheus, "/api/v1/query_exemplars", query=query, start=0, end=2e9),
        timeout_s=30,
    )
    sums = wait_until(lambda: ask(prometheus, "/api/v1/query", query=f"{name}_sum"), timeout_s=30)

    assert exemplars[0]["exemplars"][0]["labels"]["trace_id"] == TRACE_ID
    assert exemplars[0]["seriesLabels"]["service"] == "resnet-api"
    assert {s["metric"]["stage"]: float(s["value"][1]) for s in sums}["inference"] == 0.007
