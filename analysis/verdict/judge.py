"""From findings to one verdict: which kind holds, how sure, what it costs, and its rivals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib.metadata import entry_points

from stagescope.analysis.verdict.model import (
    CAUSES,
    CLIENT,
    COLD_START,
    CONTRIBUTING,
    DEPENDENCY,
    ERRORS,
    HIGH,
    HOLDS,
    LOW,
    MEDIUM,
    MODEL_CAPACITY,
    NONE,
    RULED_OUT,
    UNDETERMINED,
    UNTESTABLE,
    WORKLOAD,
    Cost,
    Evidence,
    Finding,
    Rival,
    Verdict,
)
from stagescope.analysis.verdict.rules import LEAST_SAMPLED, Rule, measured, weight
from stagescope.analysis.verdict.rules_outside import RULES
from stagescope.analysis.verdict.steps import next_steps
from stagescope.errors import UsageError

GROUP = "stagescope.verdicts"
LEAST_JUDGED = 30
CLEAR = 1.5
"""The verdict costs so many times what its next rival costs, to be sure of it."""
EXPLAINED = 0.5
"""Of a stage's own time: if so much goes with the requests' sizes, they are what differs."""
SKEW_SHARE = 0.2
"""Of latency that no part explains: the clocks are not what they were taken for."""
FIRST: tuple[str, ...] = (COLD_START, ERRORS)
"""These come before others where they hold, because they distort the others' figures."""
OWN_TIME = (DEPENDENCY, MODEL_CAPACITY, WORKLOAD)
"""Of a stage's own time, which differs from endpoint to endpoint."""


def rules() -> Sequence[Rule]:
    """Return our own rules, then those that installed packages bring.

    Raise UsageError where one of them cannot be loaded.
    """
    found: list[Rule] = list(RULES)
    for point in entry_points(group=GROUP):
        try:
            found.append(point.load())
        except Exception as problem:
            raise UsageError(
                f"the rule {point.name} ({point.value}) of {GROUP} cannot be loaded: {problem!r}"
            ) from problem
    return found


def judge(e: Evidence, asked: Iterable[Rule] | None = None) -> Verdict:
    """Return the verdict on *e*, by the rules *asked*, else by all that are installed."""
    findings = [rule(e) for rule in (rules() if asked is None else asked)]
    reason = _no_ground(e)
    holding = sorted(
        (one for one in findings if one.status == HOLDS),
        key=lambda one: (one.kind in FIRST, weight(e, one.cost_ms, one.cost_slowest_ms)),
        reverse=True,
    )
    if reason and not (holding and holding[0].kind == CLIENT and holding[0].sure):
        return _undetermined(e, findings, reason)
    if not holding:
        return _nothing_holds(e, findings)
    chosen = _explained(holding)
    others = [one for one in holding if one is not chosen]
    mixed = _mixed(e)
    if mixed and chosen.kind in OWN_TIME:
        return _undetermined(e, findings, mixed)
    confidence = _confidence(e, chosen, others, findings, mixed=bool(mixed))
    return Verdict(
        kind=chosen.kind,
        stage=chosen.stage,
        resource=chosen.resource,
        utilisation=chosen.utilisation,
        where=chosen.where,
        confidence=confidence,
        cost=_cost(e, chosen),
        evidence=(chosen.why, *_more(e, chosen, mixed)),
        rivals=_rivals(findings, chosen, others),
        untested=_untested(findings),
        next_steps=next_steps(e, chosen),
    )


def _explained(holding: Sequence[Finding]) -> Finding:
    """Return the first of *holding*, or the requests' sizes where they explain most of it."""
    chosen = holding[0]
    sizes = next((one for one in holding if one.kind == WORKLOAD), None)
    if sizes and chosen.kind in OWN_TIME and sizes.cost_ms >= EXPLAINED * chosen.cost_ms:
        return sizes
    return chosen


def _no_ground(e: Evidence) -> str:
    """Return why this run allows no verdict; empty where it may."""
    unexplained = abs(e.parts.get("unexplained", 0.0))
    if not e.answered:
        return "no request was answered: there is no time to judge"
    if e.answered <= e.bad_status:
        return "no request succeeded: the times are those of errors"
    if not e.requests:
        return (
            "no request was joined with a record of the server's: run `stagescope agent` beside "
            "the server, or name its spool with --spool"
        )
    if unexplained > SKEW_SHARE * e.mean_ms:
        return (
            f"{unexplained:,.1f} of {e.mean_ms:,.1f} ms fit no clock: the clocks of client and "
            "server do not agree"
        )
    if e.requests < LEAST_JUDGED:
        more = LEAST_JUDGED - e.requests
        return f"{e.requests:,} requests are too few to judge by: send {more:,} more at least"
    if not e.valid:
        return f"the run is INVALID: {e.invalid_reasons[0]}"
    return ""


def _mixed(e: Evidence) -> str:
    """Return that endpoints of unlike times were mixed; empty where they were not."""
    if len(e.routes) < 2 or e.routes[0].mean_ms < 2 * e.routes[-1].mean_ms:
        return ""
    slow, fast = e.routes[0], e.routes[-1]
    return (
        f"endpoints are mixed: {slow.name} takes {slow.mean_ms:,.1f} ms, {fast.name} "
        f"{fast.mean_ms:,.1f}: load each by itself"
    )


def _undetermined(e: Evidence, findings: Sequence[Finding], reason: str) -> Verdict:
    said = [one for one in findings if one.status in (HOLDS, CONTRIBUTING)]
    said.sort(key=lambda one: weight(e, one.cost_ms, one.cost_slowest_ms), reverse=True)
    return Verdict(
        kind=UNDETERMINED,
        confidence=LOW,
        evidence=(reason, *(one.why for one in said[:2])),
        rivals=tuple(
            Rival(one.kind, CONTRIBUTING if one.status == HOLDS else one.status, one.why)
            for one in findings
        ),
        untested=_untested(findings),
        next_steps=next_steps(e, Finding(UNDETERMINED, HOLDS, reason)),
    )


def _nothing_holds(e: Evidence, findings: Sequence[Finding]) -> Verdict:
    if e.overloaded:
        reason = (
            f"the server did not keep up ({e.in_flight_end:,} requests in flight at the end), "
            "and nothing that was measured says why"
        )
        return _undetermined(e, findings, reason)
    if not measured(e):
        return _undetermined(
            e, findings, "waits were not measured: what requests wait for is not known"
        )
    largest = max(e.stages, key=lambda one: one.own_ms, default=None)
    most = (
        f"the most is {largest.name} itself, {largest.own_ms:,.1f} of {e.mean_ms:,.1f} ms"
        if largest
        else f"requests took {e.mean_ms:,.1f} ms"
    )
    near = [one for one in findings if one.status in (CONTRIBUTING, UNTESTABLE)]
    return Verdict(
        kind=NONE,
        stage=largest.name if largest else "",
        confidence=MEDIUM if near else HIGH,
        evidence=(
            f"nothing is near its limit at {e.achieved_per_s:,.1f} requests/s: {most}",
            f"the event loop was {e.loop_busy or 0:.0%} busy, and no wait was a quarter of latency",
        ),
        rivals=_rivals(findings, None, ()),
        untested=_untested(findings),
        next_steps=next_steps(e, Finding(NONE, HOLDS, "", stage=largest.name if largest else "")),
    )


def _confidence(
    e: Evidence,
    chosen: Finding,
    others: Sequence[Finding],
    findings: Sequence[Finding],
    *,
    mixed: bool,
) -> str:
    found = weight(e, chosen.cost_ms, chosen.cost_slowest_ms)
    rival = max((weight(e, one.cost_ms, one.cost_slowest_ms) for one in others), default=0.0)
    clear = chosen.kind in FIRST or found >= CLEAR * rival
    blind = e.host.sampled_share < LEAST_SAMPLED or any(
        one.status == UNTESTABLE and one.kind in CAUSES and not one.kind.startswith("gpu")
        for one in findings
    )
    if not clear:
        return LOW
    if chosen.sure and not blind and not mixed:
        return HIGH
    return MEDIUM


def _cost(e: Evidence, chosen: Finding) -> Cost:
    p50 = chosen.cost_p50_ms
    if p50 is None:
        p50 = chosen.cost_ms * e.p50_ms / e.mean_ms if e.mean_ms else 0.0
    lost = None
    if chosen.kind == ERRORS:
        lost = (e.failed + e.bad_status) / e.seconds if e.seconds else None
        return Cost(None, None, lost)
    if e.overloaded and e.asked_per_s is not None:
        lost = max(0.0, e.asked_per_s - e.achieved_per_s)
    return Cost(min(p50, e.p50_ms), min(chosen.cost_slowest_ms, e.p99_ms), lost)


def _more(e: Evidence, chosen: Finding, mixed: str) -> list[str]:
    """Return what else says so."""
    found: list[str] = [mixed] if mixed else []
    stage = e.stage(chosen.stage)
    # What a batcher's own thread computes for many is not known.
    in_batch = bool(e.batches) and chosen.stage in ("batch", "inference")
    if stage is not None and stage.computed_ms is not None and not in_batch:
        found.append(
            f"`{stage.name}` took {stage.own_ms:,.1f} ms by itself, {stage.computed_ms:,.1f} of it "
            "on a core"
        )
    law = e.achieved_per_s * e.mean_ms / 1e3
    found.append(f"by Little's law {law:,.1f} requests were in flight on average")
    if e.overloaded:
        found.append(
            f"the server did not keep up: {e.in_flight_middle:,} requests in flight in the "
            f"middle of the run, {e.in_flight_end:,} at its end"
        )
    return found


def _rivals(
    findings: Sequence[Finding], chosen: Finding | None, others: Sequence[Finding]
) -> tuple[Rival, ...]:
    """Return every other kind; one that would hold but costs less contributes."""
    order = {CONTRIBUTING: 0, UNTESTABLE: 1, RULED_OUT: 2}
    found = [
        Rival(one.kind, CONTRIBUTING if one in others else one.status, one.why)
        for one in findings
        if one is not chosen
    ]
    return tuple(sorted(found, key=lambda one: order.get(one.status, 0)))


def _untested(findings: Sequence[Finding]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(one.missing for one in findings if one.missing))
