"""Records made by hand, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from stagescope.records import (
    Anchor,
    BatchRecord,
    ColdStartRecord,
    InstrumentCost,
    Member,
    Process,
    RequestRecord,
    State,
)
from stagescope.stages import StageSpan, WaitFact, partition

PROCESS = Process(
    ring_id="ab" * 16,
    pid=4242,
    service="resnet-api",
    host="gpu-7",
    boot_id="boot",
    anchor=Anchor(monotonic_ns=5_000_000_000, wall_ns=1_700_000_000_000_000_000),
    cost=InstrumentCost(base_ns=3_000, stage_ns=400),
    version="0.1.0",
    python="3.11.7",
)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
SPAN_ID = "b7ad6b7169203331"

SIX_STAGES = (
    ("queue.threadpool", 0, 100_000),
    ("preprocess", 100_000, 900_000),
    ("queue.batch", 900_000, 1_000_000),
    ("batch", 1_000_000, 2_000_000),
    ("batch.wait", 1_000_000, 1_900_000),
    ("inference", 2_000_000, 9_000_000),
    ("postprocess", 9_000_000, 9_500_000),
    ("respond", 9_500_000, 9_900_000),
)
"""(name, start, end) in ns since the request's start: a request of 10 ms."""


WAITS = (
    WaitFact("ran", 0, 100_000, 900_000),
    WaitFact("queued", 0, 100_000, 300_000),
    WaitFact("due", 0, 2_500_000, 7_600_000),
    WaitFact("ran", 0, 7_600_000, 9_900_000),
    WaitFact("gc", -1, 6_600_000, 7_600_000),
    WaitFact("stopped", -1, 9_600_000, 9_700_000),
)
"""Of the request of SIX_STAGES: it waited 0.2 ms for a core in preprocess, 3 ms for the loop and 1 ms
for the collector in inference, 0.1 ms in respond while the process was stopped."""


def stage_spans(stages: Sequence[tuple[str, int, int]], duration_ns: int) -> tuple[StageSpan, ...]:
    """Charge *stages* (name, start, end, in the order of opening) by the partition rule."""
    charged, _ = partition([(start, end) for _, start, end in stages], duration_ns)
    return tuple(
        StageSpan(name, start, end, self_ns)
        for (name, start, end), self_ns in zip(stages, charged, strict=True)
    )


def request_record(**changes: Any) -> RequestRecord:
    """Return a request of 10 ms with all six stages, a root of its trace, with *changes*."""
    made = RequestRecord(
        process=PROCESS,
        seq=0,
        state=State.FINISHED,
        trace_id=TRACE_ID,
        span_id=SPAN_ID,
        parent_span_id="",
        internal=False,
        sampled=True,
        run_id="",
        start_ns=6_000_000_000,
        duration_ns=10_000_000,
        method="POST",
        path="/predict",
        route="/predict",
        status=200,
        error="",
        request_bytes=1_000,
        response_bytes=200,
        first_byte_ns=9_600_000,
        send_wait_ns=0,
        chunks=1,
        stages=stage_spans(SIX_STAGES, 10_000_000),
        batch_ids=(),
        stages_dropped=0,
    )
    return replace(made, **changes)


def cold_start_record(**changes: Any) -> ColdStartRecord:
    """Return a cold start of three seconds, whose first request is `request_record()`."""
    made = ColdStartRecord(
        process=PROCESS,
        seq=0,
        state=State.FINISHED,
        trace_id="0af7651916cd43dd8448eb211c80319c",
        span_id="b7ad6b7169203331",
        start_ns=3_010_000_000,
        duration_ns=3_000_000_000,
        error="",
        first_request=Member(TRACE_ID, SPAN_ID),
        stages=stage_spans(
            (
                ("imports", 0, 1_000_000_000),
                ("startup", 1_000_000_000, 2_000_000_000),
                ("load.torch", 1_100_000_000, 1_900_000_000),
                ("idle", 2_000_000_000, 2_990_000_000),
                ("first_request", 2_990_000_000, 3_000_000_000),
            ),
            3_000_000_000,
        ),
        stages_dropped=0,
    )
    return replace(made, **changes)


def batch_record(**changes: Any) -> BatchRecord:
    """Return a batch of one, whose member is `request_record()`, with *changes*."""
    made = BatchRecord(
        process=PROCESS,
        seq=1,
        state=State.FINISHED,
        batch_id="00f067aa0ba902b7",
        trace_id="4bf92f3577b34da6a3ce929d0e0e4736",
        model="resnet50",
        start_ns=6_001_000_000,
        duration_ns=8_000_000,
        error="",
        size=1,
        members=(Member(TRACE_ID, SPAN_ID),),
        members_dropped=0,
        device_ns=0,
        stages=stage_spans(
            (("batch.wait", 0, 900_000), ("inference", 1_000_000, 8_000_000)), 8_000_000
        ),
        run_id="",
    )
    return replace(made, **changes)
