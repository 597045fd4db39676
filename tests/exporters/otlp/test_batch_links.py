"""Requests and batches link on stages, and Jaeger's critical path runs through every stage."""

# pyright: reportOptionalMemberAccess=false
# A span that was built has a context.

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.sdk.trace import ReadableSpan

from stagescope.exporters.otlp.batch_links import batch_link
from stagescope.exporters.otlp.queue import spans_of as counted
from stagescope.exporters.otlp.spans import SpanBuilder
from stagescope.records import BatchRecord, Member, Record, RequestRecord
from stagescope.testing.records import (
    SPAN_ID,
    TRACE_ID,
    batch_record,
    request_record,
    stage_spans,
)
from tests.support.critical_path import PathSpan, critical_path


def built(record: Record, *batches: BatchRecord) -> list[ReadableSpan]:
    links = [batch_link(batch, record) for batch in batches if isinstance(record, RequestRecord)]
    return SpanBuilder().spans(record, links)


def large_batch(members: int) -> BatchRecord:
    named = tuple(Member(TRACE_ID, f"{index + 1:016x}") for index in range(members))
    return batch_record(size=members, members=named)


def path_of(spans: list[ReadableSpan]) -> list[str]:
    return critical_path([PathSpan.of(span) for span in spans])


def test_a_request_links_to_its_batch_from_the_stage_that_ran_in_it() -> None:
    """The link, the size and the place are on `inference`; the request's own span has no link."""
    batch = batch_record(
        size=2, members=(Member("ab" * 16, "00000000000000bb"), Member(TRACE_ID, SPAN_ID))
    )
    spans = built(request_record(), batch)
    linked = {span.name: span for span in spans if span.links}

    assert list(linked) == ["inference"]
    (link,) = linked["inference"].links
    assert f"{link.context.trace_id:032x}" == batch.trace_id
    assert f"{link.context.span_id:016x}" == batch.batch_id
    told = linked["inference"].attributes or {}
    assert (told["model_server.batch.size"], told["model_server.batch.position"]) == (2, 1)
    assert (told["model_server.model"], told["model_server.batch.worker"]) == ("resnet50", 4242)


def test_of_two_batches_each_is_told_by_the_stage_of_its_time() -> None:
    """A request that ran in two batches links to each from the stage that was open meanwhile."""
    stages = stage_spans((("inference", 0, 400), ("inference", 500, 900)), 1_000)
    request = request_record(start_ns=6_000_000_000, duration_ns=1_000, stages=stages)
    first, second = (
        batch_record(size=2, batch_id=f"{n:016x}", start_ns=6_000_000_000 + at, duration_ns=390)
        for n, at in ((1, 0), (2, 500))
    )
    spans = built(request, second, first)

    assert [[link.context.span_id for link in span.links] for span in spans] == [[], [1], [2]]


@pytest.mark.parametrize("members", [2, 128, 129, 1000])
def test_a_large_batch_links_to_all_its_members(members: int) -> None:
    """No span has more than 128 links, none is on the batch's own span, and none is left out."""
    batch = large_batch(members)
    own, *children = built(batch)
    linked = [link.context.span_id for child in children for link in child.links]

    assert not own.links
    assert sorted(linked) == list(range(1, members + 1))
    assert max(len(child.links) for child in children) <= 128
    assert len({child.context.span_id for child in children}) == len(children)
    assert counted(batch) == 1 + len(children)


def test_a_batch_without_a_stage_for_the_model_links_to_its_members_too() -> None:
    """Where nobody said what the batch did, a child without length holds its links."""
    batch = batch_record(size=2, members=large_batch(2).members, stages=())
    own, child = built(batch)

    assert (child.name, len(child.links), child.start_time) == ("members", 2, own.start_time)


def test_the_critical_path_runs_through_every_stage() -> None:
    """Jaeger's path holds all stages of a request and of a batch, also those that touch."""
    batch = large_batch(300)
    on_path = set(path_of(built(request_record(), batch)))

    assert {stage.stage for stage in request_record().stages} <= on_path
    assert {"inference", "batch.wait"} <= set(path_of(built(batch)))


touching = st.lists(st.integers(0, 3_000_000), min_size=2, max_size=12).map(sorted)


@given(touching, st.integers(0, 999))
def test_stages_that_touch_are_all_on_the_path(edges: list[int], odd_ns: int) -> None:
    """Stages of 2 µs and more, each beginning where the last ended, are on Jaeger's path."""
    stages = [(f"s{index}", start, end) for index, (start, end) in enumerate(pairwise(edges))]
    record = request_record(
        start_ns=6_000_000_000 + odd_ns,
        duration_ns=edges[-1] + 1,
        stages=stage_spans(stages, edges[-1] + 1),
    )
    on_path = set(path_of(built(record)))

    assert {name for name, start, end in stages if end - start >= 3_000} <= on_path
