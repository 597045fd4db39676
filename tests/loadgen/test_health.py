"""A run whose driver was the bottleneck says so, with its figure."""

from __future__ import annotations

from stagescope.loadgen.client_log import Call, ClientLog
from stagescope.loadgen.health import health

MS = 1_000_000


def log_of(
    late_ms: float, latency_ms: float, *, errors: str = "", requests: int = 100
) -> ClientLog:
    """A run whose requests were all *late_ms* late and took *latency_ms* in all."""
    log = ClientLog(0)
    for seq in range(requests):
        call = Call(seq, seq * MS, f"{seq + 1:032x}", f"{seq + 1:016x}")
        call.started_ns = call.connected_ns = call.sent_ns = call.intended_ns + int(late_ms * MS)
        call.last_byte_ns = call.intended_ns + int(latency_ms * MS)
        call.error = errors
        log.append(call)
    return log


def reasons(log: ClientLog, cpu_share: float = 0.5) -> tuple[str, ...]:
    """Return what makes the run invalid."""
    return health(log, planned=len(log), cpu_share=cpu_share, loop="asyncio").invalid_reasons


def test_a_driver_in_time_is_valid_and_has_its_figures() -> None:
    """Lateness below the floor is a figure and no reason."""
    judged = health(log_of(0.5, 3), planned=120, cpu_share=0.2, loop="asyncio")
    assert judged.invalid_reasons == ()
    assert judged.figures["late_p99_ms"] == 0.5
    assert judged.figures["planned"] == 120
    assert judged.figures["sent"] == 100


def test_lateness_counts_beyond_a_tenth_of_the_latency() -> None:
    """6 ms are much of 20 ms and little of 100 ms."""
    assert reasons(log_of(6, 20)) == (
        "driver late: 1 % of requests were taken up more than 6.0 ms after plan",
    )
    assert reasons(log_of(6, 100)) == ()


def test_a_full_core_is_named() -> None:
    """The share of the core and the event loop stand in the sentence."""
    assert reasons(log_of(0, 1), 0.99) == (
        "driver late: it used 99% of a core (asyncio event loop): lower the rate",
    )


def test_lateness_of_the_warm_up_does_not_count() -> None:
    """Warm-up is there to be slow."""
    log = log_of(50, 60)
    log.measure_from_ns = 1_000 * MS
    assert reasons(log) == ()


def test_the_machines_own_limits_are_named() -> None:
    """Connections that our side could not open say nothing about the server."""
    assert reasons(log_of(0, 1, errors="files")) == (
        "driver limit: the limit of open files (`ulimit -n`) stopped connections for 100 requests",
    )


def test_more_timeouts_than_one_in_a_hundred_make_a_run_invalid() -> None:
    """The 99th percentile of the answered alone would hide them."""
    log = log_of(0, 5, requests=98)
    for late in log_of(0, 1_000, errors="timeout", requests=2).chunks():
        for seq in late["seq"]:
            call = Call(100 + seq, (100 + seq) * MS, f"{seq + 200:032x}", f"{seq + 200:016x}")
            call.last_byte_ns, call.error = call.intended_ns + 1_000 * MS, "timeout"
            log.append(call)
    reason = reasons(log)[-1]
    assert reason.startswith("no answer in time: 2 of 100 requests (2.0%) reached their timeout")
    assert reasons(log_of(0, 5, errors="reset")) == ()
