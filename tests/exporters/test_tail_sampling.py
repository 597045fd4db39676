"""Which requests keep their spans."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stagescope.errors import UsageError
from stagescope.exporters.otlp.queue import HeldBatches, keeps_batch
from stagescope.exporters.tail_sampling import (
    ALL,
    SLOW_AFTER,
    Reason,
    Share,
    SlowTail,
    TailSampler,
    bucket_of,
    share_from_environment,
    upper_edge,
)
from stagescope.records import Member, RequestRecord, State
from stagescope.stages import StageStall
from stagescope.testing.records import batch_record, request_record

NOTHING = Share(0.0, 0.0, 0.0)


def requests(count: int, **changes: object) -> Iterator[RequestRecord]:
    """Requests a millisecond apart, each with a trace id of its own."""
    drawn = random.Random(7)
    for index in range(count):
        yield request_record(
            trace_id=f"{drawn.getrandbits(128):032x}",
            start_ns=6_000_000_000 + index * 1_000_000,
            **changes,
        )


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run_id": "r1"}, Reason.LOAD_RUN),
        ({"run_id": "r1", "status": 500}, Reason.LOAD_RUN),
        ({"status": 502}, Reason.ERROR),
        ({"nested": True}, Reason.NESTED),
        ({"nested": True, "sampled": False}, None),
        ({"error": "ValueError"}, Reason.ERROR),
        ({"error": "disconnect"}, Reason.ERROR),
        ({"state": State.DIED}, Reason.ERROR),
        ({"status": 500, "sampled": False}, Reason.ERROR),
        ({"status": 404}, None),
        ({}, None),
    ],
)
def test_load_tests_and_errors_are_kept(changes: dict[str, object], reason: Reason | None) -> None:
    """Load-test requests and errors are always kept, even where the caller did not sample."""
    policy = TailSampler(NOTHING)
    for _ in range(1_000):  # so that the floor's share of this second is small
        policy.reason(request_record())

    assert policy.reason(request_record(**changes)) == reason


def test_about_one_a_second_of_each_route_is_kept() -> None:
    """A quiet route is seen, unless its caller said no: each request of it, and of many a few."""
    policy = TailSampler(NOTHING)
    reasons = [policy.reason(record) for record in requests(20_000)]

    assert reasons[0] is Reason.FLOOR
    assert 8 <= sum(reason is Reason.FLOOR for reason in reasons) <= 60  # of 20 s
    assert policy.reason(request_record(route="/other", sampled=False)) is None
    assert policy.reason(request_record(route="/other")) is Reason.FLOOR


@pytest.mark.parametrize("share", [NOTHING, Share(0.05, 0.05, 0.0), Share(1.0, 1.0, 1.0)])
def test_what_is_kept_stands_for_all(share: Share) -> None:
    """Counted by the reciprocal of their probabilities, the kept are as many as there were."""
    policy, total, count = TailSampler(share), 0.0, 20_000
    for index, record in enumerate(requests(count)):
        kept = policy.kept(replace(record, status=500 if index % 40 == 0 else 200))
        if kept and kept.threshold is not None:
            total += ALL / (ALL - kept.threshold)

    assert total == pytest.approx(count, rel=0.5)


@pytest.mark.parametrize(
    ("changes", "threshold"),
    [({"run_id": "r1"}, 0), ({"status": 500}, 0), ({"nested": True}, None), ({}, ALL // 2)],
)
def test_what_is_always_kept_says_so(changes: dict[str, object], threshold: int | None) -> None:
    """Errors and load runs stand for themselves; of the app's own sampler nothing is known."""
    policy = TailSampler(Share(0.5, 0.5, 0.0))
    policy.kept(request_record())
    kept = policy.kept(request_record(trace_id="f" * 32, **changes))

    assert kept is not None
    assert kept.threshold == threshold


def test_slow_tail_is_kept() -> None:
    """Once a route is known, what is above its p99 is kept, and about one in a hundred is."""
    drawn = random.Random(3)
    policy = TailSampler(NOTHING)
    reasons = [
        policy.reason(request_record(duration_ns=int(drawn.lognormvariate(16, 0.4)), sampled=False))
        for _ in range(20_000)
    ]
    slow = reasons.count(Reason.SLOW)

    assert 50 <= slow <= 300
    assert reasons.count(None) == 20_000 - slow
    assert policy.reason(request_record(duration_ns=10_000_000_000)) is Reason.SLOW


def test_profiled_requests_are_no_slow_tail() -> None:
    """However long one took under a capture, it is neither kept as slow nor does it move p99."""
    policy = TailSampler(NOTHING)
    slow = request_record(
        duration_ns=10**12, stalls=(StageStall(0, "inference", "capture", 1_000_000),)
    )
    for _ in range(SLOW_AFTER):
        policy.reason(request_record())
        assert policy.reason(slow) is not Reason.SLOW
    assert policy.reason(request_record(duration_ns=10**9)) is Reason.SLOW


def test_slow_tail_follows_the_load() -> None:
    """When a route becomes slower for good, that stops being the tail."""
    tail = SlowTail()
    for _ in range(10_000):
        tail.add(1_000_000)
    first = [tail.add(50_000_000) for _ in range(20_000)]

    assert first[0]
    assert not any(first[10_000:])


@given(st.integers(0, 2**62))
def test_buckets_are_narrow(duration_ns: int) -> None:
    """A bucket's edge is at most 6.25 % above what falls into it, and not below."""
    edge = upper_edge(bucket_of(duration_ns))

    assert duration_ns <= edge <= duration_ns * 1.0625
    assert bucket_of(edge + 1) == bucket_of(duration_ns) + 1


def test_share_goes_by_trace_id() -> None:
    """A share keeps the traces that OpenTelemetry's probability sampling would keep."""
    from opentelemetry.sdk.trace._sampling_experimental import (
        composable_traceid_ratio_based,
        composite_sampler,
    )
    from opentelemetry.sdk.trace.sampling import Decision

    policy = TailSampler(Share(0.25, 0.25, 0.0))
    theirs = composite_sampler(composable_traceid_ratio_based(0.25))
    for record in requests(400, route="/shared"):
        decision = theirs.should_sample(None, int(record.trace_id, 16), "x").decision
        assert policy.certain(record) == (decision is Decision.RECORD_AND_SAMPLE)


@pytest.mark.parametrize(
    ("sampler", "argument", "share"),
    [
        ("", "0.5", Share(0.05, 0.05, 0.0)),
        ("always_on", "", Share(1.0, 1.0, 1.0)),
        ("always_off", "", Share(0.0, 0.0, 0.0)),
        ("traceidratio", "0.5", Share(0.5, 0.5, 0.5)),
        ("parentbased_traceidratio", "0.5", Share(0.5, 1.0, 0.0)),
        ("parentbased_always_on", "", Share(1.0, 1.0, 0.0)),
        ("parentbased_always_off", "", Share(0.0, 1.0, 0.0)),
    ],
)
def test_sampler_variables(sampler: str, argument: str, share: Share) -> None:
    """OTEL_TRACES_SAMPLER and its argument govern the share as the specification says."""
    environ = {"OTEL_TRACES_SAMPLER": sampler, "OTEL_TRACES_SAMPLER_ARG": argument}

    assert share_from_environment(environ) == share


@pytest.mark.parametrize(
    ("environ", "named"),
    [
        ({"OTEL_TRACES_SAMPLER": "jaeger_remote"}, "OTEL_TRACES_SAMPLER='jaeger_remote'"),
        (
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "5%"},
            "OTEL_TRACES_SAMPLER_ARG='5%'",
        ),
        (
            {"OTEL_TRACES_SAMPLER": "traceidratio", "OTEL_TRACES_SAMPLER_ARG": "nan"},
            "OTEL_TRACES_SAMPLER_ARG='nan'",
        ),
    ],
)
def test_bad_sampler_is_named(environ: dict[str, str], named: str) -> None:
    """A sampler or ratio that cannot be used is refused in a sentence that names it."""
    with pytest.raises(UsageError, match=named.replace("%", "\\%")):
        share_from_environment(environ)


def test_share_of_one_keeps_the_last_trace_id() -> None:
    """Everything is everything: the highest trace id too; and nothing is nothing."""
    first, last = (request_record(trace_id=digit * 32) for digit in ("0", "f"))

    assert TailSampler(Share(1.0, 1.0, 1.0)).certain(last)
    assert not TailSampler(NOTHING).certain(first)


def test_routes_are_bounded() -> None:
    """A client that invents routes without end does not fill the memory."""
    policy = TailSampler(NOTHING)
    for index in range(5_000):
        policy.reason(request_record(route=f"/{index}"))

    assert len(policy.routes) <= 1024


def test_batches_are_bounded_and_released_once() -> None:
    """Held batches are bounded by their members; a batch is on its way once."""
    held = HeldBatches(max_members=100)
    members = tuple(Member("ab" * 16, f"{index:016x}") for index in range(16))
    for index in range(20):
        held.add(batch_record(batch_id=f"{index:016x}", members=members, size=16), kept=False)
    newest = f"{19:016x}"

    assert held.get(f"{0:016x}") is None
    assert held.is_held(newest)
    held.release(newest)
    assert not held.is_held(newest)
    assert held.get(newest) is not None


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, False),
        ({"run_id": "r1"}, True),
        ({"error": "OOM"}, True),
        ({"state": State.DIED}, True),
    ],
)
def test_batches_kept_for_their_own_sake(changes: dict[str, object], kept: bool) -> None:
    """A batch of a load run, one that failed, or one that died is kept without its members."""
    assert keeps_batch(batch_record(size=2, **changes)) is kept
    assert not keeps_batch(batch_record(size=1, **changes))
