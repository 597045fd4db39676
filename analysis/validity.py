"""Whether a run is to be believed; each reason is one sentence with its figures."""

from __future__ import annotations

from stagescope.analysis.report import Client, Instrument, Unmatched
from stagescope.run_folder import Run

MIN_ANSWERED = 100
"""With fewer, not one request lies beyond the 99th percentile."""

MAX_UNMATCHED = 0.01


def invalid_reasons(
    run: Run, client: Client, unmatched: Unmatched, instrument: Instrument
) -> tuple[str, ...]:
    """Give what the load driver found against the run, then what the records show."""
    found = (
        _too_few(client),
        _unmatched(run, client, unmatched),
        _lost("overwrote", instrument.overwritten),
        _lost("dropped", instrument.dropped),
    )
    return (*run.invalid_reasons, *(reason for reason in found if reason))


def _too_few(client: Client) -> str:
    counted = client.answered - client.profiled
    if counted >= MIN_ANSWERED:
        return ""
    profiled = " without being profiled" if client.profiled else ""
    return (
        f"only {counted:,} requests were answered{profiled}: "
        f"a 99th percentile needs {MIN_ANSWERED} at least"
    )


def _unmatched(run: Run, client: Client, unmatched: Unmatched) -> str:
    if run.server_source == "none" or not client.count:
        return ""
    lost = unmatched.client.answered + unmatched.server
    share = lost / client.count
    if share <= MAX_UNMATCHED:
        return ""
    return (
        f"{share:.1%} of the records met no partner: {unmatched.client.answered:,} answered "
        f"requests have no server record, {unmatched.server:,} server records no request"
    )


def _lost(what: str, count: int) -> str:
    return f"the server side {what} {count:,} records" if count else ""
