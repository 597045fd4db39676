"""Records as lines of JSON and back."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.store.serialize import lines, parse_lines, record_line
from stagescope.errors import StagescopeError
from stagescope.records import (
    Anchor,
    BatchRecord,
    ColdStartRecord,
    InstrumentCost,
    Member,
    Process,
    Record,
    RequestRecord,
    State,
)
from stagescope.stages import StageSpan, StageStall, WaitFact

NS = st.integers(0, 2**64 - 1)
TEXT = st.text(max_size=20)
SPAN_ID = st.integers(0, 2**64 - 1).map("{:016x}".format)
TRACE_ID = st.integers(0, 2**128 - 1).map("{:032x}".format)
STAGES = st.lists(st.builds(StageSpan, TEXT, NS, NS, NS, st.booleans(), st.booleans())).map(tuple)
PROCESSES = st.builds(
    Process,
    ring_id=TRACE_ID,
    pid=st.integers(1, 2**22),
    service=TEXT,
    host=TEXT,
    boot_id=TEXT,
    anchor=st.builds(Anchor, NS, NS),
    cost=st.builds(InstrumentCost, NS, NS),
    version=TEXT,
    python=TEXT,
)
COMMON = {
    "process": PROCESSES,
    "seq": st.integers(-1, 2**63),
    "state": st.sampled_from(State),
    "trace_id": TRACE_ID,
    "run_id": TEXT,
    "start_ns": NS,
    "duration_ns": NS,
    "error": TEXT,
    "stages": STAGES,
}
REQUESTS = st.builds(
    RequestRecord,
    **COMMON,
    span_id=SPAN_ID,
    parent_span_id=SPAN_ID | st.just(""),
    internal=st.booleans(),
    sampled=st.booleans(),
    method=TEXT,
    path=TEXT,
    route=TEXT,
    status=st.integers(0, 999),
    request_bytes=NS,
    response_bytes=NS,
    first_byte_ns=NS,
    send_wait_ns=NS,
    chunks=st.integers(0, 2**32),
    batch_ids=st.lists(SPAN_ID).map(tuple),
    stages_dropped=st.integers(0, 2**32),
    chunk_gaps=st.integers(0, 2**32),
    chunk_gap_sum_ns=NS,
    chunk_gap_max_ns=NS,
    stalls=st.lists(st.builds(StageStall, st.integers(-1, 99), TEXT, TEXT, NS)).map(tuple),
    wait_facts=st.lists(st.builds(WaitFact, TEXT, st.integers(-1, 31), NS, NS)).map(tuple),
)
COLD_STARTS = st.builds(
    ColdStartRecord,
    **COMMON,
    span_id=SPAN_ID,
    first_request=st.none() | st.builds(Member, TRACE_ID, SPAN_ID),
    stages_dropped=st.integers(0, 2**32),
)
BATCHES = st.builds(
    BatchRecord,
    **COMMON,
    batch_id=SPAN_ID,
    model=TEXT,
    size=st.integers(0, 2**32),
    members=st.lists(st.builds(Member, TRACE_ID, SPAN_ID)).map(tuple),
    members_dropped=st.integers(0, 2**32),
    device_ns=NS,
)


@given(st.lists(REQUESTS | BATCHES | COLD_STARTS, max_size=6))
def test_records_come_back_as_they_were(records: list[Record]) -> None:
    """Whatever the records hold, reading their lines gives equal records, in order."""
    assert list(parse_lines(lines(records))) == records


@given(REQUESTS | BATCHES | COLD_STARTS)
def test_a_record_is_one_line_of_json(record: Record) -> None:
    """A line is JSON with the field names of records.py, and holds no newline but its last."""
    line = record_line(record)
    assert line.endswith("\n")
    assert line.count("\n") == 1
    expected = set(type(record).__dataclass_fields__) - {"process"} | {"kind", "ring_id"}
    assert set(json.loads(line)) == expected


def test_lines_of_unknown_kinds_are_passed_over() -> None:
    """A newer agent may send further kinds of lines; an older client reads the rest."""
    assert list(parse_lines([b'{"kind": "sample", "value": 1}'])) == []


@pytest.mark.parametrize("line", [b"", b"[1]", b'{"kind": "request"}', b'{"no": "kind"}'])
def test_a_line_that_is_none_of_ours_is_one_sentence(line: bytes) -> None:
    """The sentence names the line and what to compare."""
    with pytest.raises(StagescopeError, match="line 1 of the agent's records cannot be read"):
        list(parse_lines([line]))
