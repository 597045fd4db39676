"""Getting the server's side of a run: agent of this host, remote agent, spans, Server-Timing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from stagescope.agent.api.client import AgentClient
from stagescope.errors import StagescopeError
from stagescope.load_run.locate import AgentLocation
from stagescope.load_run.server_timing import server_rows
from stagescope.records import BatchRecord, Record, RequestRecord
from stagescope.runfolder.rows import (
    ServerSide,
    write_kernels,
    write_records,
    write_rows,
    write_samples,
    write_stacks,
)
from stagescope.runfolder.schema import EVIDENCE

if TYPE_CHECKING:
    from stagescope.load_run.client_file import ClientFile
    from stagescope.load_run.otlp_receiver import OtlpInbox
    from stagescope.loadgen.client_log import ClientLog

MARGIN_NS = 2_000_000_000
"""Samples from so long before the first request until so long after the last are the run's too."""
SAMPLED_S = 1.5
"""Samples are taken once a second: that of the run's last moment comes after its end."""
_FETCH_POLL_S = 0.1


def collect_evidence(folder: Path, source: AgentClient, side: ServerSide) -> str:
    """Write samples, stacks and kernels of the time of *side*'s requests into *folder*.

    Returns a sentence about what is missing, or an empty one: a run is valid without them.
    """
    if not side.requests:
        return ""
    since_ns, until_ns = side.since_ns, side.until_ns
    writes: tuple[Callable[[], int], ...] = (
        lambda: write_samples(
            folder, source.samples(max(0, since_ns - MARGIN_NS), until_ns + MARGIN_NS)
        ),
        lambda: write_stacks(folder, source.stacks(since_ns, until_ns)),
        lambda: write_kernels(folder, source.kernels(since_ns, until_ns)),
    )
    try:
        _wait_until_sampled(source, until_ns)
        for write in writes:
            write()
    except StagescopeError as problem:
        return f"this run has no {_missing(folder)}: {problem}"
    except KeyboardInterrupt:
        return f"this run has no {_missing(folder)}: ended while they were collected"
    return ""


def _wait_until_sampled(source: AgentClient, until_ns: int) -> None:
    deadline = time.monotonic() + SAMPLED_S
    while not any(True for _ in source.samples(until_ns)) and time.monotonic() < deadline:
        time.sleep(_FETCH_POLL_S)


def _missing(folder: Path) -> str:
    names = [table.name for table in EVIDENCE if not (folder / table.file_name).exists()]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


SETTLED_S = 3.0
"""An agent drains several times a second: three seconds without news is the end of them."""
LONGEST_S = 60.0
"""A limit, for where another client's requests keep the run's records growing."""
_POLL_S = 0.1
SPANS_SETTLED_S = 7.0
"""Model servers send spans in batches; OpenTelemetry's default is one each five seconds."""
SPANS_LONGEST_S = 60.0
_LOSSES = ("dropped", "overwritten", "lost", "damaged", "refused", "faults")
"""Parts of the names of counters that tell what went missing; they grow as long as an agent runs."""


@dataclass(slots=True)
class Collected:
    """Where the server's side came from, and what its instrument said of itself."""

    source: str = "none"
    instrument: Mapping[str, float] = field(default_factory=dict[str, float])
    problems: list[str] = field(default_factory=list[str])
    """Sentences for the person: what was asked and gave nothing."""
    foreign: int = 0
    """Records that name the run and are of none of its requests."""
    incomplete: list[str] = field(default_factory=list[str])
    """Why a part of the server's side is missing: the run is invalid."""


def losses_so_far(place: AgentLocation) -> Mapping[str, float]:
    """Return the agent's counters of losses before a run, which are not that run's; never raises."""
    with suppress(StagescopeError):
        if agent := place.client():
            return {name: value for name, value in agent.counters().items() if _is_loss(name)}
    return {}


def collect_server_side(
    folder: Path,
    run_id: str,
    log: ClientLog | ClientFile,
    place: AgentLocation,
    before: Mapping[str, float] | None,
    inbox: OtlpInbox | None = None,
) -> Collected:
    """Write `server.parquet` and `batches.parquet` of *folder*, from the best source there is.

    Both files are there afterwards, perhaps without rows; where an agent sampled, its samples,
    stacks and kernels are there too. Raises StagescopeError where they
    cannot be written; a source that fails is a sentence in `problems`, and the next is tried.
    *before* is what `losses_so_far` gave, None where nobody asked before the run: then its losses
    are not known. *inbox* holds the spans that the server sent us.
    """
    collected = Collected()
    if _write_records(folder, run_id, log, place, before, collected):
        return collected
    if inbox is not None and _write_spans(folder, log, inbox, collected):
        return collected
    rows = (row for chunk in log.chunks() for row in server_rows(chunk))
    if write_rows(folder, rows).requests:
        collected.source = "server-timing"
        collected.problems.append(
            "the server's side is from the Server-Timing header (sums until the response began), "
            f"because {place.reason or 'no agent has records of this run'}"
        )
    elif place.reason:
        collected.problems.append(f"no server side: {place.reason}")
    return collected


def _write_records(
    folder: Path,
    run_id: str,
    log: ClientLog | ClientFile,
    place: AgentLocation,
    before: Mapping[str, float] | None,
    collected: Collected,
) -> bool:
    """Write what the agent has of the run; False where there is no agent, or it has nothing."""
    name = "remote agent" if place.agent_url else "agent"
    try:
        agent = place.client()
        if agent is None:
            return False
        if not _settled(agent, run_id, log.responded):
            collected.problems.append(
                f"the {name} has no record of this run: "
                f"is the server wrapped, and does it record into {place.spool or 'its spool'}?"
            )
            return False
        ours = _trace_ids(log)
        records = (r for r in agent.run_records(run_id) if _is_ours(r, ours, collected))
        side = write_records(folder, records, broken=_tell(collected))
        collected.source = name
        _tell_what_is_left_out(side, collected)
        collected.instrument = _instrument(agent, side, before)
        if missing := collect_evidence(folder, agent, side):
            collected.problems.append(missing)
    except StagescopeError as problem:
        collected.problems.append(str(problem))
        return collected.source != "none"
    return True


def _tell_what_is_left_out(side: ServerSide, collected: Collected) -> None:
    if collected.foreign:
        collected.problems.append(
            f"{collected.foreign:,} records that name this run are of requests that it did not "
            "send; they are left out"
        )
    if side.damaged:
        collected.incomplete.append(
            f"server side incomplete: {side.damaged:,} damaged records are left out"
        )


def _trace_ids(log: ClientLog | ClientFile) -> set[str]:
    return {trace_id for chunk in log.chunks() for trace_id in chunk["trace_id"]}


def _is_ours(record: Record, trace_ids: set[str], collected: Collected) -> bool:
    """Return whether *record* is of a request that this run sent; count those that are not.

    Anybody who has seen the run's id can name it in requests of his own.
    """
    if isinstance(record, BatchRecord):
        return any(member.trace_id in trace_ids for member in record.members)
    ours = not isinstance(record, RequestRecord) or record.trace_id in trace_ids
    collected.foreign += not ours
    return ours


def _write_spans(
    folder: Path, log: ClientLog | ClientFile, inbox: OtlpInbox, collected: Collected
) -> bool:
    """Write the rows that the model server's own spans give; False where there are none."""
    from stagescope.load_run.otlp_spans import server_rows as rows_of_spans
    from stagescope.load_run.otlp_spans import spans_of

    ours = _trace_ids(log)
    _spans_settled(inbox)
    try:
        spans = [
            span for export in inbox.exports() for span in spans_of(export) if span.trace_id in ours
        ]
    except StagescopeError as problem:
        collected.problems.append(f"the spans that were sent to us: {problem}")
        return False
    if write_rows(folder, rows_of_spans(spans)).requests:
        collected.source = "otlp"
        return True
    collected.problems.append(
        f"{inbox.spans:,} spans were sent to us, {len(spans):,} of this run's traces, none a "
        "model server's request (gen_ai.latency.*, or Triton's events): does the server take "
        "`traceparent`, and sample every trace?"
    )
    return False


def _spans_settled(inbox: OtlpInbox) -> None:
    """Wait until no more spans come, or a minute."""
    seen, begun = inbox.spans, time.monotonic()
    news = begun
    while (now := time.monotonic()) - news < SPANS_SETTLED_S and now - begun < SPANS_LONGEST_S:
        time.sleep(_POLL_S)
        if inbox.spans != seen:
            seen, news = inbox.spans, time.monotonic()


def _tell(collected: Collected) -> Callable[[StagescopeError], None]:
    return lambda problem: collected.incomplete.append(f"server side incomplete: {problem}")


def _settled(source: AgentClient, run_id: str, expected: int) -> bool:
    """Wait until the agent has all that was answered, or has no news; say if it has anything."""
    seen = -1
    news = begun = time.monotonic()
    while True:
        counts = source.run_counts(run_id)
        # More than were answered: somebody else names this run, and ours may be still to come.
        whole = counts.finished == expected
        if whole or time.monotonic() - news > SETTLED_S or time.monotonic() - begun > LONGEST_S:
            return counts.finished + counts.died > 0
        if counts.finished != seen:
            seen, news = counts.finished, time.monotonic()
        time.sleep(_POLL_S)


def _instrument(
    source: AgentClient, side: ServerSide, before: Mapping[str, float] | None
) -> Mapping[str, float]:
    costs = side.costs.values()
    figures = {name: float(value) for name, value in source.counters().items()}
    for name in [name for name in figures if _is_loss(name)]:
        if before is None:
            del figures[name]
        else:
            figures[name] -= before.get(name, 0.0)
    if costs:
        figures["request_us"] = median(cost.base_ns for cost in costs) / 1e3
        figures["stage_us"] = median(cost.stage_ns for cost in costs) / 1e3
    return figures


def _is_loss(name: str) -> bool:
    return any(part in name for part in _LOSSES)
