"""Whether the driver itself kept up: a run whose driver was the bottleneck says so.

`late` is started less intended: how long after the plan the driver took a request up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagescope.loadgen.client_log import ClientLog
from stagescope.loadgen.failures import OWN_LIMITS, TIMEOUT

LATE_FLOOR_MS = 5.0
"""Less is what a busy machine's scheduler does to anybody; the client wait shows it."""
LATE_SHARE = 0.1
"""Beyond the floor, lateness counts once it is over a tenth of what it distorts: p99 latency."""
CPU_LIMIT = 0.95
"""Of one core, over the time of sending; the driver is one thread."""
TIMEOUT_SHARE = 0.01
"""Beyond it the 99th percentile lies among requests whose latency is unknown."""


@dataclass(frozen=True, slots=True)
class Health:
    """The driver's figures for `run.json`, and what they make of the run."""

    figures: Mapping[str, float]
    invalid_reasons: tuple[str, ...]


def quantile(values: Sequence[int], share: float) -> float:
    """Return the *share* quantile (nearest rank) of *values*; 0 where there are none."""
    ordered = sorted(values)
    return float(ordered[min(int(share * len(ordered)), len(ordered) - 1)]) if ordered else 0.0


def health(log: ClientLog, *, planned: int, cpu_share: float, loop: str) -> Health:
    """Judge a run by its records; *loop* names the event loop, for the reader of the reason."""
    late = _since_intended(log, "started_ns")
    taken = _since_intended(log, "last_byte_ns")
    figures = {
        "planned": float(planned),
        "sent": float(len(log)),
        "errors": float(log.failed),
        "late_p50_ms": quantile(late, 0.5) / 1e6,
        "late_p99_ms": quantile(late, 0.99) / 1e6,
        "late_max_ms": max(late, default=0) / 1e6,
        "cpu_share": cpu_share,
    }
    late_reasons = _late(figures, quantile(taken, 0.99) / 1e6, loop)
    pairs = zip(log.errors, log.integers["intended_ns"], strict=True)
    measured = [error for error, intended in pairs if intended >= log.measure_from_ns]
    return Health(figures, (*late_reasons, *_limits(log), *timeouts(measured)))


def _since_intended(log: ClientLog, stamp: str) -> list[int]:
    """Return *stamp* less intended, of the measured phase: warm-up is there to be slow."""
    columns = log.integers
    pairs = zip(columns[stamp], columns["intended_ns"], strict=True)
    return [at - intended for at, intended in pairs if intended >= log.measure_from_ns]


def _late(figures: Mapping[str, float], latency_p99_ms: float, loop: str) -> list[str]:
    reasons: list[str] = []
    late_ms, share = figures["late_p99_ms"], figures["cpu_share"]
    if late_ms > max(LATE_FLOOR_MS, LATE_SHARE * latency_p99_ms):
        reasons.append(
            f"driver late: 1 % of requests were taken up more than {late_ms:.1f} ms after plan"
        )
    if share > CPU_LIMIT:
        reasons.append(
            f"driver late: it used {share:.0%} of a core ({loop} event loop): lower the rate"
        )
    return reasons


def _limits(log: ClientLog) -> list[str]:
    words = Counter(log.errors)
    return [
        f"driver limit: {why} for {words[word]} requests"
        for word, why in OWN_LIMITS.items()
        if words[word]
    ]


def timeouts(errors: Sequence[str]) -> list[str]:
    """Return the reason against a run with *errors*, one a measured request; none if few waited."""
    count = errors.count(TIMEOUT)
    if count <= TIMEOUT_SHARE * len(errors):
        return []
    reason = (
        f"no answer in time: {count:,} of {len(errors):,} requests ({count / len(errors):.1%}) "
        "reached their timeout, and percentiles of the answered alone hide them: "
        "lower the rate or raise the timeout"
    )
    return [reason]
