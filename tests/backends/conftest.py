"""A real Jaeger, with its storage in memory, and what its API gives back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest

from stagescope.testing import wait_until
from tests.support.critical_path import PathSpan
from tests.support.server_processes import free_port

CONFIG = """
service:
  extensions: [jaeger_storage, jaeger_query]
  pipelines:
    traces: {{receivers: [otlp], exporters: [jaeger_storage_exporter, spanmetrics]}}
    metrics/spanmetrics: {{receivers: [spanmetrics], exporters: [prometheus]}}
  telemetry: {{metrics: {{level: none}}, logs: {{level: warn}}}}
extensions:
  jaeger_query:
    storage: {{traces: kept}}
    http: {{endpoint: "127.0.0.1:{query}"}}
    grpc: {{endpoint: "127.0.0.1:{query_grpc}"}}
  jaeger_storage: {{backends: {{kept: {{memory: {{max_traces: 100000}}}}}}}}
receivers:
  otlp: {{protocols: {{grpc: {{endpoint: "127.0.0.1:{grpc}"}}, http: {{endpoint: "127.0.0.1:{http}"}}}}}}
connectors:
  spanmetrics: {{metrics_flush_interval: 1s, histogram: {{explicit: {{buckets: [10ms, 100ms]}}}}}}
exporters:
  jaeger_storage_exporter: {{trace_storage: kept}}
  prometheus: {{endpoint: "127.0.0.1:{metrics}"}}
"""


@dataclass(frozen=True, slots=True)
class Jaeger:
    """A running one, by its ports on loopback."""

    grpc: int
    http: int
    query: int
    metrics: int

    @property
    def endpoint(self) -> str:
        """What `--otlp` is given."""
        return f"http://127.0.0.1:{self.http}"

    def answers(self) -> bool:
        """Return whether it can be asked; what it knows is null as long as it got nothing."""
        with (
            suppress(URLError, ConnectionError),
            urlopen(f"http://127.0.0.1:{self.query}/api/services"),
        ):
            return True
        return False

    def ask(self, path: str, **parameters: str | int) -> Any:
        """Return the data of an answer of its API; None while it does not answer."""
        with (
            suppress(URLError, ConnectionError),
            urlopen(f"http://127.0.0.1:{self.query}{path}?{urlencode(parameters)}") as answer,
        ):
            return json.load(answer)["data"]
        return None

    def traces(self, service: str, **parameters: str | int) -> list[dict[str, Any]]:
        """Return the traces that a span of *service* is in."""
        found = self.ask(
            "/api/traces", service=service, limit=5000, lookback="1h", **parameters
        )  # fmt: skip
        return found or []

    def span_metrics(self) -> str:
        """Return the text of the metrics that its connector makes of spans."""
        with urlopen(f"http://127.0.0.1:{self.metrics}/metrics") as answer:
            return str(answer.read().decode())


@pytest.fixture(scope="session")
def jaeger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Jaeger]:
    """Start one; it is stopped at the end."""
    program = os.environ.get("STAGESCOPE_TEST_JAEGER")
    assert program, "make test-backends builds Jaeger and names it in STAGESCOPE_TEST_JAEGER"
    folder = tmp_path_factory.mktemp("jaeger")
    running, ports = _started(program, folder)
    try:
        yield ports
    finally:
        running.terminate()
        running.wait(timeout=30)


def _started(program: str, folder: Path) -> tuple[subprocess.Popen[bytes], Jaeger]:
    names = ("grpc", "http", "query", "query_grpc", "metrics")
    ports = {name: free_port() for name in names}
    (folder / "jaeger.yaml").write_text(CONFIG.format(**ports))
    with (folder / "jaeger.log").open("wb") as log:
        # Its own traces would go to port 4317 of this host.
        running = subprocess.Popen(
            [program, "--config", str(folder / "jaeger.yaml")], stdout=log, stderr=log,
            env=os.environ | {"OTEL_TRACES_SAMPLER": "always_off"},
        )  # fmt: skip
    jaeger = Jaeger(ports["grpc"], ports["http"], ports["query"], ports["metrics"])
    try:
        wait_until(jaeger.answers, timeout_s=60)
    except BaseException:
        running.kill()
        running.wait()
        print((folder / "jaeger.log").read_text())
        raise
    return running, jaeger


def tags(span: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a span."""
    return {tag["key"]: tag["value"] for tag in span["tags"]}


def path_span(span: Mapping[str, Any]) -> PathSpan:
    """Return what of a span its critical path depends on: the parent is the first reference."""
    first = next(iter(span["references"]), None)
    return PathSpan(
        span["operationName"], span["spanID"], first["spanID"] if first else "",
        span["startTime"], span["startTime"] + span["duration"],
    )  # fmt: skip
