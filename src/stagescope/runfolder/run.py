"""A run folder's `run.json`: the plan, the circumstances, and whether the run is to be believed."""

from __future__ import annotations

import json
import os
import platform
import socket
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from stagescope.errors import UsageError
from stagescope.files import replace_file
from stagescope.identity import boot_id
from stagescope.runfolder.schema import SCHEMA_VERSION

RUN_JSON = "run.json"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked of the load driver; null is what nobody told us of a client of one's own."""

    url: str
    method: str
    rate_per_s: float | None = None
    duration_s: float | None = None
    warmup_s: float | None = None
    arrivals: str = ""
    """`poisson` or `constant`."""
    seed: int | None = None
    timeout_s: float | None = None
    body_bytes: int | None = None
    headers: tuple[str, ...] = ()
    """Names only: values may be secrets."""
    accept_encoding: str = ""
    """Whether the server may compress; empty in folders of older versions."""


@dataclass(frozen=True, slots=True)
class Host:
    """Where the load driver ran."""

    name: str
    boot_id: str
    cores: int
    system: str
    python: str


@dataclass(frozen=True, slots=True)
class Run:
    """One load run, as `run.json` holds it."""

    run_id: str
    plan: Plan
    host: Host
    started_wall_ns: int
    """Unix epoch; with started_ns the client's clock anchor."""
    started_ns: int
    measured_s: float
    """How long the measured phase really lasted (shorter than planned after Ctrl-C)."""
    client_file: str = ""
    """Name of the file from which the client's side came; empty: the load driver sent it."""
    server_source: str = "none"
    """`agent`, `remote agent`, `otlp`, `server-timing` or `none`."""
    interrupted: bool = False
    invalid_reasons: tuple[str, ...] = ()
    """Empty where the run is valid."""
    driver: Mapping[str, float] = field(default_factory=dict[str, float])
    """The driver's own health: `late_p99_ms`, `cpu_share`, `planned`, `sent`."""
    instrument: Mapping[str, float] = field(default_factory=dict[str, float])
    """The server side's own cost: `request_us`, `stage_us`, `overwritten`, ... of the agent."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    schema_version: int = SCHEMA_VERSION


def this_host() -> Host:
    """Describe the machine that this process runs on."""
    return Host(
        name=socket.gethostname(),
        boot_id=boot_id(),
        cores=os.cpu_count() or 1,
        system=platform.platform(),
        python=platform.python_version(),
    )


def write_run(folder: Path, run: Run) -> None:
    """Write *run* to `run.json` in *folder*, whole or not at all."""
    replace_file(folder / RUN_JSON, json.dumps(asdict(run), indent=2) + "\n", mode=0o666)


def read_run(folder: Path) -> Run:
    """Read `run.json` of *folder*, of this or an older version.

    Raises UsageError, which names the file, where it is missing, torn, foreign or newer.
    """
    file = folder / RUN_JSON
    try:
        data: Any = json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(f"{folder} is no run folder: it has no {RUN_JSON}") from None
    except OSError as problem:
        raise UsageError(f"{file} cannot be read: {problem.strerror}") from None
    except ValueError as problem:
        raise UsageError(f"{file} is not JSON: {problem}") from None
    try:
        return _run_of(data)
    except (KeyError, TypeError, AttributeError) as problem:
        raise UsageError(f"{file} is not a run of stagescope's: {problem!r}") from None


def _run_of(data: Mapping[str, Any]) -> Run:
    version = int(data["schema_version"])
    if version > SCHEMA_VERSION:
        raise UsageError(
            f"this run folder has schema {version}, this stagescope reads up to {SCHEMA_VERSION}: "
            "upgrade stagescope"
        )
    plan = data["plan"]
    known: dict[str, Any] = {name: data[name] for name in Run.__dataclass_fields__ if name in data}
    known["plan"] = Plan(**plan | {"headers": tuple(plan.get("headers", ()))})
    known["host"] = Host(**data["host"])
    run = Run(**known)
    return replace(run, invalid_reasons=tuple(run.invalid_reasons))
