"""Stages of stacks whose frames tell none, by the one request that was served then."""

from dataclasses import replace

import pytest

from stagescope.agent.stacks.labels import stage_at, with_intervals
from stagescope.agent.store.recent import RecentRequests
from stagescope.stacks import Frame, StackSpan
from stagescope.testing.records import PROCESS, request_record

MS = 1_000_000
REQUEST = request_record(start_ns=1000 * MS)
"""Ten ms, `inference` from the second to the ninth."""
SPAN = StackSpan(
    PROCESS.pid, 1, "MainThread", 1004 * MS, 1006 * MS, 1, "", "none", True,
    (Frame("work", "/app/a.py", 1),), "window", "in-process",
)  # fmt: skip


def told(span: StackSpan = SPAN, error_ms: float = 1.0, **changes: object) -> tuple[str, str]:
    """Return stage and how it is known."""
    asked: dict[str, object] = {
        "spans": [span], "served": [REQUEST], "serving_since_ns": [], "whole_since_ns": 0,
        "error_ns": int(error_ms * MS),
    }  # fmt: skip
    found = with_intervals(**(asked | changes))[0]  # type: ignore[arg-type]
    return found.stage, found.by


def test_one_request_alone_tells_its_stage() -> None:
    """Also where another one began later, or is still served since later."""
    assert told() == ("inference", "interval")
    later = replace(REQUEST, start_ns=1020 * MS)
    assert told(served=[REQUEST, later], serving_since_ns=[1030 * MS]) == ("inference", "interval")


@pytest.mark.parametrize(
    "changes",
    [
        {"served": [REQUEST, replace(REQUEST, start_ns=1004 * MS)]},
        {"served": []},
        {"serving_since_ns": [1003 * MS]},
        {"whole_since_ns": 1005 * MS},
        {"spans": [SPAN, replace(SPAN, thread_id=2)]},
        {"spans": [replace(SPAN, running=False)]},
        {"error_ns": 4 * MS},
    ],
    ids=["two", "none", "unfinished", "not-all-known", "two-threads", "waiting", "near-an-edge"],
)
def test_whatever_else_it_may_be_tells_nothing(changes: dict[str, object]) -> None:
    """Several requests or threads, gaps in what is known, and stages shorter than the error."""
    assert told(**changes) == ("", "none")  # type: ignore[arg-type]


def test_what_the_frames_tell_stays() -> None:
    """A mark or a block is exact."""
    assert told(replace(SPAN, stage="mine", by="block")) == ("mine", "block")


def test_the_stage_opened_last_is_the_one() -> None:
    """As the partition charges it."""
    assert [stage_at(REQUEST, (1000 + at) * MS) for at in (0, 1, 5)] == [
        "queue.threadpool", "batch.wait", "inference",
    ]  # fmt: skip
    assert stage_at(REQUEST, 2000 * MS) == ""


def test_recent_requests_know_from_when_on_they_are_whole() -> None:
    """The newest are kept; what went ended before `whole_since_ns`."""
    recent = RecentRequests(2)
    requests = [replace(REQUEST, start_ns=at * 100 * MS) for at in range(4)]
    recent.accept(requests)
    assert recent.of(PROCESS.ring_id, 0) == requests[2:]
    assert recent.of(PROCESS.ring_id, 300 * MS) == requests[3:]
    assert recent.of("another", 0) == []
    assert recent.whole_since_ns == 110 * MS
    assert recent.settled == recent.accepted == 4
