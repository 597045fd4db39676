"""The load driver's own spans: a CLIENT root for each request, the server's trace inside it."""

# pyright: reportOptionalMemberAccess=false
# A span that was built has a context.

from __future__ import annotations

from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan

from stagescope.exporters.otlp.client_spans import ClientSpanBuilder
from stagescope.exporters.otlp.spans import SpanBuilder
from stagescope.runfolder.run import Plan, Run, this_host
from stagescope.testing.records import PROCESS, TRACE_ID, request_record
from tests.support.critical_path import PathSpan, critical_path

SENT_BY = "00000000000000aa"
SERVER = request_record(parent_span_id=SENT_BY, run_id="r1")
BEGAN_NS = SERVER.start_ns
DONE_NS = BEGAN_NS + SERVER.duration_ns
RUN = Run(
    "r1", Plan(url="http://gpu-7:8000/predict", method="POST", rate_per_s=50.0), this_host(), 0, 0, 0.0
)  # fmt: skip


def client_row(**changes: Any) -> dict[str, Any]:
    """Return what the driver kept of `SERVER`'s request, sent 2 ms late, with *changes*."""
    row = {
        "trace_id": TRACE_ID, "span_id": SENT_BY, "phase": "measure", "status": 200, "error": "",
        "intended_ns": BEGAN_NS - 2_500_000, "started_ns": BEGAN_NS - 500_000,
        "connected_ns": BEGAN_NS - 200_000, "sent_ns": BEGAN_NS - 100_000,
        "first_byte_ns": DONE_NS - 30_000, "last_byte_ns": DONE_NS + 80_000,
        "request_bytes": 1_000, "response_bytes": 200, "chunks": 1, "streamed": False,
    }  # fmt: skip
    return row | changes


def client_spans(row: dict[str, Any], server_end_ns: int | None = DONE_NS) -> list[ReadableSpan]:
    return ClientSpanBuilder(RUN, PROCESS.anchor).spans(row, server_end_ns)


def test_a_client_root_with_the_parts_of_its_time() -> None:
    """From when it should have been sent to its last byte; wait, connect, send, first byte, rest."""
    root, *parts = client_spans(client_row())

    assert (root.name, root.kind.name, root.parent) == ("POST /predict", "CLIENT", None)
    assert root.start_time == PROCESS.anchor.wall(BEGAN_NS - 2_500_000)
    assert root.end_time == PROCESS.anchor.wall(DONE_NS + 80_000)
    assert [part.name for part in parts] == [
        "client wait", "connect", "send", "first byte wait", "receive",
    ]  # fmt: skip
    assert {part.parent.span_id for part in parts if part.parent} == {root.context.span_id}
    assert root.resource.attributes["service.name"] == "stagescope-load"
    told = root.attributes or {}
    assert told["model_server.load_run.id"] == "r1"
    assert told["model_server.load_run.rate"] == 50.0
    assert told["model_server.duration_ns"] == 12_580_000 + 0
    assert told["model_server.client.first_byte_ns"] == 12_470_000


@pytest.mark.parametrize("row", [client_row(), client_row(first_byte_ns=DONE_NS + 40_000)])
def test_the_critical_path_runs_through_client_and_server(row: dict[str, Any]) -> None:
    """All parts of the client's time and all stages of the server are on Jaeger's path."""
    client = client_spans(row)
    on_path = set(critical_path([PathSpan.of(s) for s in (*client, *SpanBuilder().spans(SERVER))]))

    assert {stage.stage for stage in SERVER.stages} <= on_path
    assert {"client wait", "connect", "send", "first byte wait"} <= on_path


def test_the_servers_span_lies_in_its_parent() -> None:
    """The first byte came before the server was done: the span that holds it ends no earlier."""
    by_id = {span.context.span_id: span for span in client_spans(client_row())}
    own = SpanBuilder().spans(SERVER)[0]
    parent = by_id[own.parent.span_id]  # type: ignore[union-attr]

    assert parent.name == "first byte wait"
    assert (parent.start_time or 0) <= (own.start_time or 0)
    assert (parent.end_time or 0) >= (own.end_time or 0)


def test_a_server_that_is_done_after_the_clients_last_byte_lies_in_its_parents_too() -> None:
    """Jaeger warns of a child that ends after its parent; the exact latency is an attribute."""
    row = client_row()
    row["last_byte_ns"] = row["first_byte_ns"]
    done_ns = row["last_byte_ns"] + 400_000
    root, *parts = client_spans(row, done_ns)
    wait = next(part for part in parts if part.name == "first byte wait")

    late_by = (wait.end_time or 0) - (wait.start_time or 0) - (row["last_byte_ns"] - row["sent_ns"])
    assert late_by >= 400_000
    assert root.end_time == wait.end_time
    assert root.attributes is not None
    assert root.attributes["model_server.duration_ns"] == row["last_byte_ns"] - row["intended_ns"]


def test_a_stream_hangs_under_the_root() -> None:
    """The server goes on long after the first byte: its parent is the CLIENT span, which holds it."""
    root, *_ = client_spans(client_row(first_byte_ns=BEGAN_NS + 1_000_000))

    assert root.context.span_id == int(SENT_BY, 16)


@pytest.mark.parametrize(
    ("changes", "status", "error"),
    [
        ({}, "UNSET", None),
        ({"status": 404}, "ERROR", "404"),
        ({"status": 503}, "ERROR", "503"),
        ({"status": 200, "error": "timeout"}, "ERROR", "timeout"),
    ],
)
def test_what_the_client_saw_go_wrong(
    changes: dict[str, Any], status: str, error: str | None
) -> None:
    """A response from 400 on, or none, is an error of the CLIENT span, with its type."""
    root, *_ = client_spans(client_row(**changes))

    assert root.status.status_code.name == status
    assert (root.attributes or {}).get("error.type") == error


def test_a_request_that_never_reached_the_server_is_there() -> None:
    """Nothing listened: a root with the wait and the connect, whose part is the error."""
    row = client_row(
        error="refused", status=0, connected_ns=BEGAN_NS, sent_ns=BEGAN_NS, first_byte_ns=None,
        last_byte_ns=BEGAN_NS,
    )  # fmt: skip
    root, *parts = client_spans(row, None)

    assert [(part.name, part.status.status_code.name) for part in parts] == [
        ("client wait", "UNSET"), ("connect", "ERROR"),
    ]  # fmt: skip
    assert root.status.status_code.name == "ERROR"
    assert "http.response.status_code" not in (root.attributes or {})
