"""The last resort for a stack whose frames tell no stage: what the one request did at that time.

Only where exactly one request was being served in the process, and no other thread ran. The
times of samples have an error (py-spy's: 10 ms and one period), marks and blocks have none: so a
stage is named only where it lasted from *error* before the sample to *error* after it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from stagescope.records import RequestRecord
from stagescope.stacks import StackSpan


def with_intervals(
    spans: Sequence[StackSpan],
    served: Sequence[RequestRecord],
    serving_since_ns: Sequence[int],
    whole_since_ns: int,
    error_ns: int,
) -> list[StackSpan]:
    """Give *spans* of one process, with a stage where its requests tell one.

    *served* are those that ended, all from *whole_since_ns* on; *serving_since_ns* the starts of
    those that did not; *error_ns* is how far the times of *spans* may be off.
    """
    running = sorted((s for s in spans if s.running), key=lambda span: span.start_ns)
    starts = [span.start_ns for span in running]
    oldest_ns = min(serving_since_ns, default=1 << 63)

    def alone(span: StackSpan, at_ns: int) -> bool:
        before = running[: bisect_right(starts, at_ns)]
        return not any(
            other.end_ns > at_ns and other.thread_id != span.thread_id for other in before
        )

    def told(span: StackSpan) -> StackSpan:
        at_ns = span.seen_ns
        since_ns, until_ns = at_ns - error_ns, at_ns + error_ns
        if span.stage or not span.running or not whole_since_ns <= since_ns < until_ns < oldest_ns:
            return span
        there = [
            one
            for one in served
            if one.start_ns <= until_ns and since_ns < one.start_ns + one.duration_ns
        ]
        if len(there) != 1 or not alone(span, at_ns):
            return span
        stages = {stage_at(there[0], ns) for ns in (since_ns, at_ns, until_ns)}
        stage = stages.pop() if len(stages) == 1 else ""
        return replace(span, stage=stage, by="interval") if stage else span

    return [told(span) for span in spans]


def stage_at(request: RequestRecord, at_ns: int) -> str:
    """Give the stage that is charged at *at_ns*: of those open the one opened last; else none."""
    since_ns = at_ns - request.start_ns
    there = [span for span in request.stages if span.start_ns <= since_ns < span.end_ns]
    # Of two opened at the same instant the later one in the list was opened last.
    there.reverse()
    return max(there, key=lambda span: span.start_ns).stage if there else ""
