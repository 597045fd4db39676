"""What a load run is asked for, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.runfolder.run import Run

if TYPE_CHECKING:
    from stagescope.analysis.report import Report


@dataclass(frozen=True, slots=True)
class LoadPlan:
    """All that a run is asked for, beside the URL.

    The server's side comes from the agent of *spool* on this host, or from that at *agent_url*
    with its bearer *token*, else from the spans that the model server sends to *otlp_listen*
    (`grpc://HOST:PORT`, `http://HOST:PORT`), else from the `Server-Timing` response header.
    """

    rate_per_s: float = 10.0
    duration_s: float = 30.0
    warmup_s: float = 2.0
    arrivals: str = "poisson"
    """`poisson` or `constant`."""
    seed: int = 0
    timeout_s: float = 30.0
    method: str = ""
    """Empty: POST where there is a body, else GET."""
    headers: tuple[str, ...] = ()
    """Texts like `Name: value`."""
    body: Path | bytes | None = None
    json_text: str | None = None
    cacert: Path | None = None
    """Certificates to trust, as PEM, beside those of the system."""
    insecure: bool = False
    """Leave the server's certificate unchecked."""
    out: Path | None = None
    """The run folder; None: `runs/RUN-ID` below the working directory."""
    spool: Path | None = None
    agent_url: str = ""
    token: str = ""
    otlp_listen: tuple[str, ...] = ()
    otlp: str = ""
    """Where the driver's own spans go, by OTLP; empty: where the `OTEL_*` variables say, if they do."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """A load run on disk."""

    path: Path
    run: Run
    notes: tuple[str, ...] = ()
    """Sentences for the person: what was asked of the server's side and gave nothing."""

    def report(self) -> Report:
        """Read the folder and return its report, as `stagescope report` prints it."""
        from stagescope.analysis.build import build_report

        return build_report(self.path)
