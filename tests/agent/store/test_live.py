"""The last minute of requests, by service and route."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.agent.store.live import MAX_ROUTES, WINDOW_S, LiveWindow
from stagescope.records import RequestRecord
from stagescope.testing.clock import HandClock
from stagescope.testing.records import request_record

MS, S = 1_000_000, 1_000_000_000


def ended_at(second: float, duration_ns: int = 5 * MS, **changes: Any) -> RequestRecord:
    """Return a request that ended then and charged 2 ms to `inference.forward`."""
    span = request_record().stages[0]._replace(stage="inference.forward", self_ns=2 * MS)
    start_ns = int(second * S) - duration_ns
    made = replace(request_record(), start_ns=start_ns, duration_ns=duration_ns, stages=(span,))
    return replace(made, **changes)


def window(now_s: float = 1000.0) -> LiveWindow:
    """Return an empty window at that moment."""
    return LiveWindow(HandClock(int(now_s * S)))


def test_routes_have_rate_errors_latency_and_stages() -> None:
    """Each route is summed by itself; stages and `other` add up to its mean."""
    live = window()
    live.accept([ended_at(990 + n / 100) for n in range(200)])
    live.accept([ended_at(999, 40 * MS, route="/slow", status=503)])

    slow, fast = sorted(live.read(), key=lambda one: one.requests)
    assert (fast.requests, fast.errors, slow.requests, slow.errors) == (200, 0, 1, 1)
    assert fast.mean_ms == pytest.approx(5)
    assert fast.stages_ms == {"inference": pytest.approx(2), "other": pytest.approx(3)}
    assert (slow.p95_ms, slow.p99_ms) == (None, None)


@given(st.lists(st.integers(1, 10**11), min_size=100, max_size=300))
def test_percentiles_are_at_most_six_percent_too_high(durations: list[int]) -> None:
    """The estimate lies between the true value and 6.25 % above it."""
    live = window()
    live.accept([ended_at(999, duration) for duration in durations])
    (route,) = live.read()

    true_ns = sorted(durations)[-(-99 * len(durations) // 100) - 1]
    assert route.p99_ms is not None
    assert true_ns / 1e6 <= route.p99_ms <= true_ns / 1e6 * 1.0625


def test_what_is_older_than_the_window_is_forgotten() -> None:
    """A request counts for a minute after its end, and for as long as is asked."""
    clock = HandClock(1000 * S)
    live = LiveWindow(clock)
    live.accept([ended_at(930), ended_at(950), ended_at(995)])

    assert [one.requests for one in live.read()] == [2]
    assert [one.requests for one in live.read(10)] == [1]
    clock.tick(WINDOW_S * S)
    live.accept([])
    assert live.read() == []


def test_invented_routes_are_bounded() -> None:
    """Routes beyond the bound count as `other`, so that no client can fill the memory."""
    live = window()
    live.accept([ended_at(999, route=f"/{n}") for n in range(500)])

    assert len(live.read()) == MAX_ROUTES + 1
    assert sum(one.requests for one in live.read()) == 500
