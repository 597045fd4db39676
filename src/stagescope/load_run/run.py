"""A load run from its settings to its folder: drive, keep, ask the server's side, keep again."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.errors import StagescopeError, UsageError
from stagescope.identity import RUN_ID
from stagescope.load_run.collect import AgentLocation, Collected, collect_server_side, losses_so_far
from stagescope.load_run.otlp_receiver import Endpoint, endpoint
from stagescope.loadgen.arrivals import schedule
from stagescope.loadgen.client_log import ClientLog
from stagescope.loadgen.driver import Driver
from stagescope.loadgen.health import health
from stagescope.loadgen.session import Watch, drive
from stagescope.loadgen.target import Target, target
from stagescope.runfolder.parquet import TableFile
from stagescope.runfolder.rows import write_rows
from stagescope.runfolder.run import Plan, Run, this_host, write_run
from stagescope.runfolder.schema import CLIENT

if TYPE_CHECKING:
    from stagescope.load_run.otlp_receiver import OtlpInbox

RUNS = Path("runs")
"""Where run folders go that were given no place: below the working directory."""


@dataclass(frozen=True, slots=True)
class Settings:
    """All that a run is asked for."""

    target: Target
    rate_per_s: float = 10.0
    duration_s: float = 30.0
    warmup_s: float = 2.0
    arrivals: str = "poisson"
    seed: int = 0
    timeout_s: float = 30.0
    out: Path | None = None
    place: AgentLocation = field(default_factory=AgentLocation)
    otlp_listen: tuple[Endpoint, ...] = ()
    """Where to take the model server's own spans while it is loaded."""


def load_run(
    url: str,
    *,
    rate_per_s: float = 10.0,
    duration_s: float = 30.0,
    warmup_s: float = 2.0,
    arrivals: str = "poisson",
    method: str = "",
    headers: tuple[str, ...] = (),
    body: Path | None = None,
    json_text: str | None = None,
    seed: int = 0,
    timeout_s: float = 30.0,
    out: Path | None = None,
    spool: Path | None = None,
    agent_url: str = "",
    token: str = "",
    otlp_listen: tuple[str, ...] = (),
) -> Path:
    """Load *url* and give the run folder; `stagescope load` from Python.

    The server's side comes from the agent of *spool* on this host, or from that at *agent_url*
    with its bearer *token*, else from the spans that the model server sends to *otlp_listen*
    (`grpc://HOST:PORT`, `http://HOST:PORT`), else from the `Server-Timing` header of the answers.
    Raises UsageError for what cannot be run as given, StagescopeError where nothing answers.
    """
    aim = target(url, method=method, headers=headers, body=body, json_text=json_text)
    place = AgentLocation(spool=spool, agent_url=agent_url, token=token)
    inboxes = tuple(endpoint(text) for text in otlp_listen)
    settings = Settings(
        aim, rate_per_s, duration_s, warmup_s, arrivals, seed, timeout_s, out, place, inboxes
    )
    return execute(settings)[0]


def execute(settings: Settings, watch: Watch | None = None) -> tuple[Path, Run, Collected]:
    """Run *settings*; what was measured is on disk before the server's side is asked for."""
    plan = schedule(
        settings.arrivals,
        settings.rate_per_s,
        settings.duration_s,
        settings.warmup_s,
        settings.seed,
    )
    if not 0 < settings.timeout_s <= 86_400:
        raise UsageError(
            f"timeout {settings.timeout_s:g} is not usable: it is seconds, above 0, at most a day"
        )
    run_id = fresh_run_id()
    folder = _free_folder(settings.out or RUNS / run_id)
    driver = Driver(settings.target, plan, run_id, timeout_s=settings.timeout_s)
    before = losses_so_far(settings.place)
    with _inbox(settings.otlp_listen) as inbox:
        loop = drive(driver, settings.target, plan.end_ns / 1e9, watch)
        run = _run(settings, run_id, driver, loop)
        _make(folder)
        _keep(folder, run, driver.log)
        collected = _collect(folder, run_id, driver.log, settings.place, before, inbox)
    run = replace(
        run,
        server_source=collected.source,
        instrument=collected.instrument,
        invalid_reasons=(*run.invalid_reasons, *collected.incomplete),
    )
    write_run(folder, run)
    return folder, run, collected


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
    """Give a run id that sorts by time: `20260131-235959-1a2b`, local time."""
    run_id = f"{time.strftime('%Y%m%d-%H%M%S')}-{os.urandom(2).hex()}"
    assert RUN_ID.fullmatch(run_id)
    return run_id


def _free_folder(folder: Path) -> Path:
    """Refuse before the run what would fail after it."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} exists and is not empty: choose another place with --out")
    return folder


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise StagescopeError(f"{folder} cannot be made: {problem.strerror}") from problem


def _keep(folder: Path, run: Run, log: ClientLog) -> None:
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


def _run(settings: Settings, run_id: str, driver: Driver, loop: str) -> Run:
    judged = health(driver.log, planned=driver.planned, cpu_share=driver.cpu_share, loop=loop)
    faults = (f"driver fault: {fault!r}" for fault in driver.faults[:1])
    return Run(
        run_id=run_id,
        plan=_plan(settings),
        host=this_host(),
        started_wall_ns=driver.started_wall_ns,
        started_ns=driver.started_ns,
        measured_s=driver.measured_s,
        interrupted=driver.interrupted,
        invalid_reasons=(*judged.invalid_reasons, *faults),
        driver=judged.figures,
        versions=_versions(loop),
    )


def _plan(settings: Settings) -> Plan:
    aim = settings.target
    return Plan(
        url=aim.shown_url,
        method=aim.method,
        rate_per_s=settings.rate_per_s,
        duration_s=settings.duration_s,
        warmup_s=settings.warmup_s,
        arrivals=settings.arrivals,
        seed=settings.seed,
        timeout_s=settings.timeout_s,
        body_bytes=len(aim.body),
        headers=tuple(name for name, _ in aim.headers),
    )


def _versions(loop: str) -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    versions: dict[str, str] = {}
    for name in ("stagescope", "aiohttp", "pyarrow", *(["uvloop"] if loop == "uvloop" else [])):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "from a source tree"
    return versions
