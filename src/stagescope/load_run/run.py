"""A load run from its settings to its folder: drive, keep, ask the server's side, keep again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.errors import StagescopeError, UsageError
from stagescope.identity import RUN_ID, own_version
from stagescope.load_run.client_spans import client_transport, send_client_spans
from stagescope.load_run.collect import Collected, collect_server_side, losses_so_far
from stagescope.load_run.locate import HANDOVER_S, AgentLocation, locate, opened_run
from stagescope.load_run.otlp_receiver import Endpoint, endpoint
from stagescope.load_run.plan import LoadPlan, RunFolder
from stagescope.loadgen.arrivals import schedule
from stagescope.loadgen.client_log import ClientLog
from stagescope.loadgen.driver import Driver
from stagescope.loadgen.health import health
from stagescope.loadgen.progress import Watch
from stagescope.loadgen.session import drive
from stagescope.loadgen.target import ACCEPT_ENCODING, Target, target
from stagescope.runfolder.parquet import TableFile
from stagescope.runfolder.rows import write_rows
from stagescope.runfolder.run import Plan, Run, this_host, write_run
from stagescope.runfolder.schema import CLIENT

if TYPE_CHECKING:
    from stagescope.load_run.client_file import ClientFile
    from stagescope.load_run.otlp_receiver import OtlpInbox

RUNS = Path("runs")
"""Where run folders go that were given no place: below the working directory."""


def execute(plan: LoadPlan, url: str, watch: Watch | None = None) -> RunFolder:
    """Run *plan*; what was measured is on disk before the server's side is asked for."""
    aim = target(
        url,
        method=plan.method,
        headers=plan.headers,
        body=plan.body,
        json_text=plan.json_text,
        cacert=plan.cacert,
        insecure=plan.insecure,
    )
    arrivals = schedule(plan.arrivals, plan.rate_per_s, plan.duration_s, plan.warmup_s, plan.seed)
    if not 0 < plan.timeout_s <= 86_400:
        raise UsageError(
            f"timeout {plan.timeout_s:g} is not usable: it is seconds, above 0, at most a day"
        )
    inboxes = tuple(endpoint(text) for text in plan.otlp_listen)
    transport = client_transport(plan.otlp)
    run_id = fresh_run_id()
    folder = free_folder(plan.out or RUNS / run_id)
    driver = Driver(aim, arrivals, run_id, timeout_s=plan.timeout_s)
    named = AgentLocation(plan.spool, plan.agent_url, plan.token)
    place = locate(named, aim)
    before = losses_so_far(place)
    with _inbox(inboxes) as inbox, opened_run(place, aim, run_id):
        loop = drive(driver, aim, arrivals.end_ns / 1e9, watch)
        run = _run(plan, aim, run_id, driver, loop)
        make_folder(folder)
        keep_client(folder, run, driver.log)
        if place.reason:  # The server may have opened its recorder file at the first request.
            place = locate(named, aim, wait_s=HANDOVER_S)
        collected = _collect(folder, run_id, driver.log, place, before, inbox)
    if transport is not None:
        problem = send_client_spans(transport, run, driver.log, folder)
        collected.problems += [problem] if problem else []
    return completed(folder, run, collected)


def completed(folder: Path, run: Run, collected: Collected) -> RunFolder:
    """Write `run.json` anew, with what was collected of the server's side."""
    run = replace(
        run,
        server_source=collected.source,
        instrument=collected.instrument,
        invalid_reasons=(*run.invalid_reasons, *collected.incomplete),
    )
    write_run(folder, run)
    return RunFolder(folder, run, tuple(collected.problems))


@contextmanager
def _inbox(endpoints: tuple[Endpoint, ...]) -> Iterator[OtlpInbox | None]:
    """Listen for spans, where that was asked for."""
    if not endpoints:
        yield None
        return
    from stagescope.load_run.otlp_receiver import OtlpInbox

    with OtlpInbox(endpoints) as inbox:
        yield inbox


def fresh_run_id() -> str:
    """Return a run id that sorts by time and cannot be guessed: local time and 64 random bits."""
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(8).hex()}"
    assert RUN_ID.fullmatch(run_id)
    return run_id


def free_folder(folder: Path) -> Path:
    """Refuse before the run what would fail after it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty: choose another place with --out")
    return folder


def make_folder(folder: Path) -> None:
    """Make *folder*; raise StagescopeError, which says why not."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise StagescopeError(f"{folder} cannot be made: {problem.strerror}") from problem


def keep_client(folder: Path, run: Run, log: ClientLog | ClientFile) -> None:
    """Write what the client measured: `client.parquet`, then `run.json`."""
    with TableFile(folder, CLIENT) as file:
        for chunk in log.chunks():
            file.write_columns(chunk)
    write_run(folder, run)


def _collect(
    folder: Path,
    run_id: str,
    log: ClientLog,
    place: AgentLocation,
    before: Mapping[str, float],
    inbox: OtlpInbox | None,
) -> Collected:
    try:
        return collect_server_side(folder, run_id, log, place, before, inbox)
    except KeyboardInterrupt:
        write_rows(folder, ())
        return Collected(incomplete=["server side incomplete: ended while it was collected"])


def _run(plan: LoadPlan, aim: Target, run_id: str, driver: Driver, loop: str) -> Run:
    judged = health(driver.log, planned=driver.planned, cpu_share=driver.cpu_share, loop=loop)
    faults = (f"driver fault: {fault!r}" for fault in driver.faults[:1])
    return Run(
        run_id=run_id,
        plan=_plan(plan, aim),
        host=this_host(),
        started_wall_ns=driver.started_wall_ns,
        started_ns=driver.started_ns,
        measured_s=driver.measured_s,
        interrupted=driver.interrupted,
        invalid_reasons=(*judged.invalid_reasons, *faults),
        driver=judged.figures,
        versions=_versions(loop),
    )


def _plan(plan: LoadPlan, aim: Target) -> Plan:
    return Plan(
        url=aim.shown_url,
        method=aim.method,
        rate_per_s=plan.rate_per_s,
        duration_s=plan.duration_s,
        warmup_s=plan.warmup_s,
        arrivals=plan.arrivals,
        seed=plan.seed,
        timeout_s=plan.timeout_s,
        body_bytes=len(aim.body),
        headers=tuple(name for name, _ in aim.headers),
        accept_encoding=aim.header("Accept-Encoding") or ACCEPT_ENCODING,
    )


def _versions(loop: str) -> dict[str, str]:
    others = ("aiohttp", "pyarrow", *(["uvloop"] if loop == "uvloop" else []))
    return {"stagescope": own_version(), **{name: version(name) for name in others}}
