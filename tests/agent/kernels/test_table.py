"""The kernel table, from traces made by hand as a CUDA device's profiler writes them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.kernels.capture import degraded_reason
from stagescope.agent.kernels.rows import common, gaps, length, self_times, union
from stagescope.agent.kernels.table import KernelTable, kernel_table
from stagescope.agent.kernels.trace import CaptureFacts, Opening, StageAt, TorchCapture, TraceEvent
from stagescope.kernels import KernelRow

US = 1_000
MODEL, LOOP, OTHER = 11, 12, 13
"""Threads."""


def facts(**changes: object) -> CaptureFacts:
    """A recording of one millisecond on a device."""
    told = {
        "capture_id": "c", "pid": 7, "torch": "2.13", "device": True, "operators": False,
        "profiled_since_ns": 0, "since_ns": 0, "until_ns": 1_000 * US, "profiled_until_ns": 2_000 * US,
        "batches": 1, "ended_by": "batches", "stop_s": 0.01, "save_s": 0.01,
    }  # fmt: skip
    return CaptureFacts(**(told | changes))  # type: ignore[arg-type]


def opening(stage: str, start_us: int, end_us: int, thread: int = MODEL, who: str = "a") -> Opening:
    return Opening(stage, thread, start_us * US, end_us * US, who, who, "request")


def launch(
    number: int, start_us: float, length_us: float = 5, name: str = "cudaLaunchKernel",
    thread: int = MODEL,
) -> TraceEvent:  # fmt: skip
    return _event("cuda_runtime", name, thread, start_us, length_us, number)


def kernel(number: int, start_us: float, length_us: float, name: str = "gemm") -> TraceEvent:
    return _event("kernel", name, 7, start_us, length_us, number)


def copy(number: int, start_us: float, length_us: float) -> TraceEvent:
    name = "Memcpy HtoD (Pageable -> Device)"
    return _event("gpu_memcpy", name, 7, start_us, length_us, number)


def _event(
    category: str, name: str, thread: int, start_us: float, length_us: float, number: int
) -> TraceEvent:
    start = round(start_us * US)
    return TraceEvent(category, name, thread, start, start + round(length_us * US), number, 0)


def captured(
    openings: Sequence[Opening], events: Sequence[TraceEvent], **changes: object
) -> TorchCapture:
    return TorchCapture(
        facts(**changes), openings, 0, {MODEL: "model", LOOP: "loop"}, {999: MODEL}, events, {}, 0
    )


def stage_row(table: KernelTable, stage: str) -> KernelRow:
    (found,) = [row for row in table.rows if row.kind == "stage" and row.stage == stage]
    return found


def test_kernels_belong_to_the_stage_that_launched_them() -> None:
    """By thread and time of the launch, also where the kernel runs after the stage has closed."""
    table = kernel_table(
        captured(
            [opening("preprocess", 0, 100), opening("inference", 100, 200)],
            [launch(1, 90), kernel(1, 110, 30, "resize"), launch(2, 120), kernel(2, 250, 10)],
        )
    )
    names = {(row.stage, row.name, row.busy_ns) for row in table.rows if row.kind == "kernel"}

    assert names == {("preprocess", "resize", 30 * US), ("inference", "gemm", 10 * US)}
    assert stage_row(table, "preprocess").device == "cuda:0"
    assert (table.works, table.nowhere, table.by_time, table.ambiguous) == (2, 0, 0, 0)


def test_a_graphs_kernels_share_its_launch() -> None:
    """One launch of a CUDA graph, many kernels: all of them belong to the stage that replayed it."""
    events = [launch(5, 110, 20, "cudaGraphLaunch")]
    events += [kernel(5, 130 + 10 * number, 9, f"k{number}") for number in range(5)]
    table = kernel_table(captured([opening("inference", 100, 200)], events))

    row = stage_row(table, "inference")
    assert (row.launches, row.busy_ns, row.unmatched) == (5, 45 * US, 0)


def test_concurrent_kernels_are_busy_once() -> None:
    """A stage's busy time is the union over streams; its kernels' rows are sums."""
    table = kernel_table(
        captured(
            [opening("inference", 0, 100)],
            [launch(1, 0), launch(2, 6), kernel(1, 10, 50), kernel(2, 20, 50)],
        )
    )

    assert stage_row(table, "inference").busy_ns == 60 * US
    assert [row.busy_ns for row in table.rows if row.kind == "kernel"] == [100 * US]


def test_idle_and_waiting_for_the_host() -> None:
    """Idle before a launch that came late is the host's; idle after a launch in time is not."""
    late = [launch(1, 0), kernel(1, 10, 20), launch(2, 60), kernel(2, 70, 30)]
    row = stage_row(kernel_table(captured([opening("inference", 0, 100)], late)), "inference")
    # 0-10 before the first, 30-70 between: both launched after what came before had ended.
    assert (row.span_ns, row.idle_ns, row.host_wait_ns) == (100 * US, 50 * US, 50 * US)
    assert row.bound == "launch"

    early = [launch(1, 0), launch(2, 6), kernel(1, 10, 20), kernel(2, 70, 30)]
    row = stage_row(kernel_table(captured([opening("inference", 0, 100)], early)), "inference")
    assert (row.idle_ns, row.host_wait_ns) == (50 * US, 10 * US)


@pytest.mark.parametrize(
    ("stage", "events", "bound"),
    [
        ("inference", [launch(1, 0), kernel(1, 5, 90)], "kernel"),
        ("inference", [launch(1, 0, 5, "cudaMemcpyAsync"), copy(1, 5, 90)], "copy"),
        ("inference", [launch(1, 0), launch(2, 6), kernel(1, 8, 3), kernel(2, 90, 3)], "launch"),
        (
            "postprocess",
            [launch(1, 0), launch(2, 1, 70, "cudaStreamSynchronize"), launch(3, 2),
             kernel(1, 5, 30), kernel(3, 45, 50)],
            "sync",
        ),
        (
            "inference",
            [launch(1, 0, 5, "cudaMemcpyAsync"), copy(1, 5, 20), launch(2, 90), kernel(2, 95, 5)],
            "mixed",
        ),
    ],
)  # fmt: skip
def test_what_bounds_a_stage(stage: str, events: list[TraceEvent], bound: str) -> None:
    """Each rule of docs/capture.md on its own, and two at once."""
    table = kernel_table(captured([opening(stage, 0, 100)], events))

    assert stage_row(table, stage).bound == bound


def test_launches_whose_work_was_not_seen_are_counted() -> None:
    """And work whose launch was not seen stands under no stage."""
    table = kernel_table(
        captured([opening("inference", 0, 100)], [launch(1, 0), launch(2, 9), kernel(1, 10, 5),
                                                  kernel(77, 50, 5)])
    )  # fmt: skip

    assert stage_row(table, "inference").unmatched == 1
    assert stage_row(table, "").launches == 1
    assert table.nowhere == 1


def test_only_what_was_launched_in_the_window_counts() -> None:
    """The first batch, thrown away, and what was launched after the last one are not in it."""
    table = kernel_table(
        captured(
            [opening("inference", 0, 3_000)],
            [launch(1, 5), kernel(1, 150, 9), launch(2, 120), kernel(2, 160, 9),
             launch(3, 1_500), kernel(3, 1_600, 9)],
            since_ns=100 * US,
        )
    )  # fmt: skip

    assert table.works == 1
    assert stage_row(table, "inference").span_ns == 900 * US


def test_threads_go_by_other_names_and_none() -> None:
    """A thread by CUPTI's name for it; one without a stage works for the one inference."""
    events = [launch(1, 10, thread=999), kernel(1, 20, 5), launch(2, 30, thread=OTHER),
              kernel(2, 40, 5)]  # fmt: skip
    table = kernel_table(captured([opening("inference", 0, 100)], events))
    assert stage_row(table, "inference").launches == 2
    assert table.by_time == 1

    two = [opening("inference.a", 0, 100), opening("inference.b", 0, 100, LOOP, "b")]
    assert kernel_table(captured(two, events)).nowhere == 1


def test_an_event_loop_with_several_requests_is_ambiguous() -> None:
    """Where different stages of different requests are open, the last opened is taken, and said."""
    both = [opening("preprocess", 0, 100, LOOP, "a"), opening("inference", 10, 60, LOOP, "b")]
    stage_at = StageAt(both, {})

    assert stage_at(LOOP, 20 * US) == ("inference", "ambiguous")
    assert stage_at(LOOP, 5 * US) == ("preprocess", "thread")
    assert stage_at(LOOP, 80 * US) == ("preprocess", "thread")
    assert stage_at(LOOP, 100 * US) == ("", "none")
    nested = [opening("inference", 0, 100), opening("inference.forward", 10, 60)]
    assert StageAt(nested, {})(MODEL, 20 * US) == ("inference.forward", "thread")
    together = [opening("inference", 0, 100), opening("inference.forward", 0, 60)]
    assert StageAt(together, {})(MODEL, 20 * US) == ("inference.forward", "thread")


def test_a_capture_that_saw_nothing_is_degraded() -> None:
    """The model was called and no kernel was seen: never a success."""
    capture = captured([opening("inference", 0, 100)], [])
    assert "no kernel was seen" in degraded_reason(capture, kernel_table(capture))
    on_cpu = captured([opening("inference", 0, 100)], [], device=False, operators=True)
    assert "torch ran no operator" in degraded_reason(on_cpu, kernel_table(on_cpu))
    quiet = captured([], [], batches=0)
    assert "no batch came" in degraded_reason(quiet, kernel_table(quiet))
    seen = captured([opening("inference", 0, 100)], [launch(1, 0), kernel(1, 5, 9)])
    assert degraded_reason(seen, kernel_table(seen)) == ""


times = st.lists(st.tuples(st.integers(0, 1_000), st.integers(0, 200)), max_size=40)


@given(times)
def test_rows_add_up(drawn: list[tuple[int, int]]) -> None:
    """Union within sum and span; idle and busy fill the span; the host's part is within idle."""
    events = []
    for number, (start, lasts) in enumerate(drawn, 1):
        events += [launch(number, start // 2, 1), kernel(number, start, lasts, f"k{number % 3}")]
    table = kernel_table(
        captured([opening("inference", 0, 400), opening("postprocess", 400, 1_000)], events)
    )
    for head in [row for row in table.rows if row.kind == "stage"]:
        own = [row for row in table.rows if row.stage == head.stage and row.kind == "kernel"]
        assert head.launches == sum(row.launches for row in own)
        assert head.busy_ns <= sum(row.busy_ns for row in own)
        assert 0 <= head.host_wait_ns <= head.idle_ns <= head.span_ns
    busy = union((e.start_ns, e.end_ns) for e in events if e.category == "kernel")
    for head in [row for row in table.rows if row.kind == "stage" and row.stage]:
        span = [(0, 400 * US)] if head.stage == "inference" else [(400 * US, 1_000 * US)]
        assert head.idle_ns + length(common(busy, span)) == head.span_ns


@given(times)
def test_stretches(drawn: list[tuple[int, int]]) -> None:
    """A union is as long as the points that it covers, and its gaps are all the others."""
    stretches = [(start, start + lasts) for start, lasts in drawn]
    covered = union(stretches)
    points = {at for start, end in stretches for at in range(start, end)}

    assert length(covered) == len(points)
    assert length(gaps(covered, 0, 1_300)) == 1_300 - len(points)
    assert common(covered, covered) == covered
    assert common(covered, gaps(covered, 0, 1_300)) == []


@st.composite
def calls(draw: st.DrawFn) -> list[TraceEvent]:
    """Operators of one thread, each within the one that called it."""
    events: list[TraceEvent] = []

    def call(start: int, end: int, depth: int) -> None:
        events.append(TraceEvent("cpu_op", f"op{depth}", MODEL, start, end, 0, 0))
        at = start
        while depth < 3 and end - at > 4 and draw(st.booleans()):
            first = draw(st.integers(at, end - 2))
            last = draw(st.integers(first + 1, end))
            call(first, last, depth + 1)
            at = last

    call(0, draw(st.integers(5, 200)), 0)
    return events


@given(calls())
def test_self_times_sum_to_the_outermost_operator(events: list[TraceEvent]) -> None:
    """Whatever calls whatever, no instant is charged twice and none is lost."""
    wrap_app = max(event.end_ns - event.start_ns for event in events)

    assert sum(self_ns for _, self_ns in self_times(events)) == wrap_app
