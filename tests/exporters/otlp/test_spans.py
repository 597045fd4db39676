"""Records become spans with the right ids, times, nesting, links and words."""

# pyright: reportOptionalMemberAccess=false
# A span that was built has a context.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.trace import SpanKind

from stagescope.exporters.otlp.batch_links import batch_link
from stagescope.exporters.otlp.spans import SpanBuilder
from stagescope.exporters.otlp.stage_spans import enclosing
from stagescope.exporters.tail_sampling import Kept, Reason
from stagescope.records import BatchRecord, Record, RequestRecord, State
from stagescope.semconv import (
    ATTRIBUTES,
    BATCH_SPAN,
    CLIENT_PART_SPAN,
    CLIENT_SPAN,
    COLD_START_SPAN,
    REQUEST_SPAN,
    STAGE_SPAN,
)
from stagescope.stages import StageStall, WaitFact
from stagescope.testing.records import (
    PROCESS,
    SPAN_ID,
    TRACE_ID,
    WAITS,
    batch_record,
    cold_start_record,
    request_record,
    stage_spans,
)
from tests.exporters.otlp.test_client_spans import client_row, client_spans

DURATION_NS = 1_000
times = st.integers(-200, 1_400)
stages_of_any_kind = st.lists(
    st.tuples(st.sampled_from(["queue", "batch.wait", "mine"]), times, times), max_size=12
).map(lambda drawn: sorted(((n, min(a, b), max(a, b)) for n, a, b in drawn), key=lambda s: s[1]))


def spans_of(record: Record, *batches: BatchRecord) -> list[ReadableSpan]:
    links = [batch_link(batch, record) for batch in batches if isinstance(record, RequestRecord)]
    return SpanBuilder().spans(record, links, Kept(Reason.LOAD_RUN, 0))


def span_ids(spans: Sequence[ReadableSpan]) -> list[int]:
    return [span.context.span_id for span in spans]


@given(stages_of_any_kind)
def test_children_lie_within_their_parent(stages: list[tuple[str, int, int]]) -> None:
    """Whatever a record says, no stage's span leaves the span that it nests in."""
    record = request_record(duration_ns=DURATION_NS, stages=stage_spans(stages, DURATION_NS))
    spans = spans_of(record)
    by_id = {span.context.span_id: span for span in spans}

    assert len(by_id) == len(spans)
    for span in spans[1:]:
        assert span.parent is not None
        parent = by_id[span.parent.span_id]
        assert (parent.start_time or 0) <= (span.start_time or 0) <= (span.end_time or 0)
        assert (span.end_time or 0) <= (parent.end_time or 0)


@given(stages_of_any_kind)
def test_self_times_and_other_sum_to_the_duration(stages: list[tuple[str, int, int]]) -> None:
    """The self times of all stage spans and `model_server.other_ns` are the request's length."""
    record = request_record(duration_ns=DURATION_NS, stages=stage_spans(stages, DURATION_NS))
    own, *children = spans_of(record)
    told = [child.attributes["model_server.stage.self_ns"] for child in children]  # type: ignore[index]

    assert sum(told) + own.attributes["model_server.other_ns"] == DURATION_NS  # type: ignore[index,operator,arg-type]
    assert own.attributes["model_server.duration_ns"] == DURATION_NS  # type: ignore[index]


def test_same_record_gives_same_spans() -> None:
    """A record exported twice, by two agents, is the same spans: ids depend on it alone."""
    assert span_ids(spans_of(request_record())) == span_ids(spans_of(request_record()))


def test_ids_and_times_are_the_records() -> None:
    """Trace, span, parent and wall times are what the record and its anchor say."""
    own = spans_of(request_record(parent_span_id="00000000000000aa"))[0]

    assert f"{own.context.trace_id:032x}" == TRACE_ID
    assert f"{own.context.span_id:016x}" == SPAN_ID
    assert own.parent is not None
    assert own.parent.span_id == 0xAA
    assert own.parent.is_remote
    assert own.start_time == 1_700_000_001_000_000_000
    assert own.end_time == 1_700_000_001_010_000_000


@pytest.mark.parametrize(
    ("changes", "name", "kind"),
    [
        ({}, "POST /predict", SpanKind.SERVER),
        ({"route": ""}, "POST", SpanKind.SERVER),
        (
            {"internal": True, "parent_span_id": "00000000000000aa"},
            "POST /predict",
            SpanKind.INTERNAL,
        ),
        ({"method": "BREW", "route": ""}, "HTTP", SpanKind.SERVER),
    ],
)
def test_name_and_kind(changes: dict[str, object], name: str, kind: SpanKind) -> None:
    """A span is named by method and route, never by path; INTERNAL under the app's own span."""
    own = spans_of(request_record(**changes))[0]

    assert (own.name, own.kind) == (name, kind)


@pytest.mark.parametrize(
    ("changes", "status", "error"),
    [
        ({}, "UNSET", None),
        ({"status": 404}, "UNSET", None),
        ({"status": 503}, "ERROR", "503"),
        ({"status": 500, "error": "ValueError"}, "ERROR", "ValueError"),
        ({"status": 0, "error": "incomplete"}, "ERROR", "incomplete"),
        ({"error": "disconnect"}, "UNSET", "disconnect"),
        ({"state": State.DIED, "status": 0}, "ERROR", "process_died"),
    ],
)
def test_status_and_error(changes: dict[str, object], status: str, error: str | None) -> None:
    """The server's faults are errors, each with its type; the client's are not."""
    own = spans_of(request_record(**changes))[0]

    assert own.status.status_code.name == status
    assert (own.attributes or {}).get("error.type") == error


def test_death_names_the_stage() -> None:
    """A request whose process died says in which stage, and that stage's span is an error."""
    *before, last = request_record().stages[:6]
    stages = (*before, last._replace(open=True))
    own, *children = spans_of(request_record(state=State.DIED, status=0, stages=stages))

    assert (own.attributes or {})["model_server.died_in_stage"] == "inference"
    assert own.status.description == "the process died in stage inference"
    assert [child.name for child in children if not child.status.is_unset] == ["inference"]


def test_overlapping_stages_are_siblings() -> None:
    """A stage nests in one that encloses it; one that outlives another stands beside it."""
    stages = stage_spans(
        (("queue", 0, 10), ("preprocess", 20, 60), ("mine", 30, 40), ("batch", 35, 90)), 100
    )

    assert enclosing(stages) == [None, None, 1, None]


def test_a_cold_start_is_a_tree_of_its_own() -> None:
    """Named `cold start`, without a parent, linked to the first request, its parts its children."""
    own, *parts = spans_of(cold_start_record())

    assert (own.name, own.parent, own.kind) == ("cold start", None, SpanKind.INTERNAL)
    assert [link.context.span_id for link in own.links] == [int(request_record().span_id, 16)]
    assert own.context is not None
    ids = {part.name: part.context.span_id for part in parts if part.context}
    assert [(part.name, part.parent and part.parent.span_id) for part in parts] == [
        ("imports", own.context.span_id),
        ("startup", own.context.span_id),
        ("load.torch", ids["startup"]),
        ("idle", own.context.span_id),
        ("first_request", own.context.span_id),
    ]


def test_resource_is_the_served_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The resource is the process that served; the environment adds, and names what has no name."""
    monkeypatch.setenv(
        "OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=staging,host.name=x"
    )
    monkeypatch.setenv("OTEL_SERVICE_NAME", "from-the-environment")
    resource = spans_of(request_record())[0].resource.attributes

    assert resource["service.name"] == "resnet-api"
    assert resource["service.instance.id"] == PROCESS.ring_id
    assert (resource["host.name"], resource["process.pid"]) == ("gpu-7", 4242)
    assert resource["deployment.environment.name"] == "staging"


def test_own_time_and_waits_are_on_the_stages_of_a_load_run() -> None:
    """Each stage has what it waited for by cause, and what is left; both sum to its self time."""
    _, *children = spans_of(request_record(run_id="r1", wait_facts=WAITS))
    told = {
        child.name: {
            key.removeprefix("model_server.stage."): value
            for key, value in (child.attributes or {}).items()
            if ".wait." in key or key.endswith(".own_ns")
        }
        for child in children
    }

    assert told["preprocess"] == {"own_ns": 600_000, "wait.cpu_ns": 200_000}
    assert told["inference"] == {
        "own_ns": 3_000_000, "wait.event_loop_ns": 3_000_000, "wait.gc_ns": 1_000_000,
    }  # fmt: skip
    assert told["respond"] == {"own_ns": 300_000, "wait.stopped_ns": 100_000}
    assert told["postprocess"] == {"own_ns": 500_000}


@pytest.mark.parametrize("facts", [(), WAITS[4:]])
def test_where_steps_were_not_watched_there_are_neither(facts: tuple[WaitFact, ...]) -> None:
    """Outside an opened load run own time and waits are absent, not 0: they are not known."""
    for span in spans_of(request_record(wait_facts=facts)):
        assert not [key for key in span.attributes or {} if ".wait." in key or ".own" in key]


def test_every_attribute_is_in_the_table() -> None:
    """What spans carry is in the published table, on that kind of span and of that type."""
    request = request_record(
        method="BREW", run_id="r1", send_wait_ns=5, batch_ids=("00f067aa0ba902b7",),
        stages_dropped=1, state=State.DIED, chunk_gaps=2, chunk_gap_sum_ns=9, chunk_gap_max_ns=6,
        stages=tuple(stage._replace(open=True) for stage in request_record().stages),
    )  # fmt: skip
    batch = batch_record(device_ns=5, members_dropped=1, run_id="r1", state=State.DIED)
    own, *children = spans_of(request)
    of_batch = spans_of(batch)[0]
    request = replace(
        request,
        stalls=tuple(StageStall(0, "queue", cause, 5) for cause in ("gc", "loop", "capture")),
        wait_facts=WAITS,
    )
    cold = cold_start_record(state=State.DIED, stages_dropped=1)
    own, *children = spans_of(request, batch)
    of_cold = spans_of(cold)[0]
    client, *parts = client_spans(client_row(error="reset", status=500))
    seen = {
        (key, place, type(value).__name__)
        for place, span in [
            (REQUEST_SPAN, own),
            *((STAGE_SPAN, child) for child in children),
            (BATCH_SPAN, of_batch),
            (COLD_START_SPAN, of_cold),
            (CLIENT_SPAN, client),
            *((CLIENT_PART_SPAN, part) for part in parts),
        ]
        for key, value in (span.attributes or {}).items()
    }
    types = {
        "string": "str",
        "int": "int",
        "double": "float",
        "boolean": "bool",
        "string[]": "tuple",
    }

    assert seen == {
        (known.name, place, types[known.type])
        for known in ATTRIBUTES
        for place in known.on
        if place != "resource"
    }
