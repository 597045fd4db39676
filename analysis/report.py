"""The report of one run: what `stagescope report` prints, and its JSON (docs/report-schema.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from stagescope.analysis.resources.model import Resources
from stagescope.analysis.verdict.model import UNDETERMINED, Evidence, Tail, Verdict
from stagescope.runfolder.run import Run

SCHEMA = 2
"""Version of the JSON; it grows when a key changes its meaning or goes."""


@dataclass(frozen=True, slots=True)
class Own:
    """What a part took itself, its waits taken off, in ms; see docs/waits.md."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    low_ms: float
    """Of the mean: what it took at least, and at most."""
    high_ms: float
    share_slowest: float
    """Of the mean latency of the slowest 1 %."""
    waits: Mapping[str, float]
    """Mean wait by cause; with `mean_ms` they sum to the part's mean."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Which stage of other requests held what was waited for."""

    stage: str
    """Full name; empty: not known, code that belongs to no request of the run."""
    where: str
    """The line in which it was seen most, `function (file:line)`; empty: not known."""
    share: float
    """Of the wait."""


@dataclass(frozen=True, slots=True)
class Wait:
    """What requests waited for one cause, all stages together, in ms."""

    cause: str
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    share: float
    """Of the mean latency."""
    share_slowest: float
    low_ms: float
    """Of the mean: at least, and at most. Equal where it is no estimate."""
    high_ms: float
    held_by: tuple[Holder, ...]


@dataclass(frozen=True, slots=True)
class Held:
    """One cell of the matrix: a stage that waited for the event loop, and one that held it."""

    waited: str
    stage: str
    where: str
    mean_ms: float


@dataclass(frozen=True, slots=True)
class Part:
    """One part of client latency: figures in ms, shares as fractions."""

    name: str
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    share: float
    """Of the mean latency."""
    share_slowest: float
    """Of the mean latency of the slowest 1 %."""
    inner: tuple[Part, ...] = ()
    """Parts inside this one; what they leave of it was charged to the part itself."""
    recorded: bool = True
    """False for a stage that no mark, hook or batcher opened: its figures are unknown, not 0."""
    own: Own | None = None
    """None where waits were not measured: no load run, or no server side from an agent."""


@dataclass(frozen=True, slots=True)
class Latency:
    """Latency of all answered requests, in ms."""

    measured_from: str
    """`intended` (client latency) or `sent` (service time)."""
    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float
    p50_interval_ms: tuple[float, float] | None = None
    """Between which the true median lies, at 95 %; None: too few requests, as for the two below."""
    p95_interval_ms: tuple[float, float] | None = None
    p99_interval_ms: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True)
class Client:
    """What the client saw in the measured phase; counts of requests."""

    planned: int
    """By the driver's plan, warm-up included; 0 where the driver did not say."""
    count: int
    """Sent, or tried to, in the measured phase."""
    answered: int
    """A whole response came, with any status."""
    profiled: int
    """Of those answered: a capture was at work meanwhile. They are in no time and no stage."""
    failed: int
    asked_rate_per_s: float | None
    """None where a client of one's own sent the requests."""
    achieved_rate_per_s: float
    """Answered requests per second of the measured phase."""
    errors: Mapping[str, int]
    """Failed requests by error word."""
    status: Mapping[str, int]
    """Answered requests by class of status: `2xx`, ..."""
    latency: Latency | None
    """None where no request was answered, or all were profiled."""
    service_time: Latency | None
    rejected: int = 0
    """Answered with 429 or 503 by something before the server: they have no server record."""
    overloaded: bool = False
    """The server did not keep up: the requests in flight grew beyond the arrivals' scatter."""
    in_flight_middle: int = 0
    """Requests in flight in the middle of the measured phase."""
    in_flight_end: int = 0
    first_token: Latency | None = None
    """Of streams, from `intended` until the body's first bytes; None without streams."""
    inter_token: Latency | None = None
    """Of streams: each request's mean time between pieces of its body."""


@dataclass(frozen=True, slots=True)
class Joined:
    """How client and server records met; counts of requests."""

    by: str
    """`trace_id+parent_span_id`, `trace_id`, `mixed` or `none`."""
    requests: int
    """Answered, joined and not profiled: the base of the breakdown."""
    by_parent: int
    one_clock: int
    server_timing: int
    extra_server: int
    source: str
    """Where the server's side came from: `agent`, `remote agent`, `otlp`, `server-timing`, `none`."""


@dataclass(frozen=True, slots=True)
class UnmatchedClient:
    """Measured client requests without a server record."""

    total: int
    before_server: int
    """Failed before a byte was sent: there was nothing to record."""
    failed: int
    """Sent, but no whole response came."""
    answered: int
    """Answered: here a server record is really missing."""


@dataclass(frozen=True, slots=True)
class Unmatched:
    """Records that met no partner."""

    client: UnmatchedClient
    server: int
    """Server records of this run whose trace no client row has."""


@dataclass(frozen=True, slots=True)
class Batches:
    """The run's batches."""

    count: int
    failed: int
    mean_size: float
    p50_size: float
    max_size: int
    mean_wait_ms: float
    mean_collate_ms: float
    mean_inference_ms: float
    warmup_included: bool
    """True where warm-up's batches could not be told from the others (no common clock)."""


@dataclass(frozen=True, slots=True)
class Instrument:
    """What measuring cost and lost on the server's side."""

    cost_us: float | None
    """Per request: the middleware's base and its mean number of stage openings; None: unknown."""
    stages_per_request: float
    dropped: int | None
    overwritten: int | None
    """These two are None where nobody counted."""
    stages_dropped: int
    server_after_ms: float
    """Mean time that the server went on after the client had the last byte; not in latency."""


@dataclass(frozen=True, slots=True)
class Report:
    """One run's report."""

    folder: Path
    run: Run
    invalid_reasons: tuple[str, ...]
    client: Client
    join: Joined
    total: Part | None
    """Client latency of the breakdown's base; None where there is nothing to break down."""
    parts: tuple[Part, ...]
    """In order; their means sum to `total`'s."""
    stages: tuple[Part, ...]
    """Those of `parts` that are the server's stages."""
    waits: tuple[Wait, ...]
    """By cause; empty where they were not measured."""
    held: tuple[Held, ...]
    """Who held the event loop for whom, the longest first."""
    batches: Batches
    unmatched: Unmatched
    died: Mapping[str, int]
    """Requests that were in flight when their server process died, by the stage it died in."""
    instrument: Instrument
    resources: Resources | None
    """What the stages used; None where nothing was sampled."""
    tail: Tail | None = None
    """Why the slowest 1 % are slow; None where there are too few to tell."""
    evidence: Evidence | None = None
    """What the verdict was judged by; it is not in the JSON."""
    verdict: Verdict = field(default_factory=lambda: Verdict(UNDETERMINED))

    @property
    def valid(self) -> bool:
        """True where the run is to be believed."""
        return not self.invalid_reasons

    def part(self, name: str) -> Part | None:
        """Return the part called *name*, at any depth."""
        found = (inner for part in self.parts for inner in (part, *part.inner))
        return next((part for part in found if part.name == name), None)

    def to_json(self) -> dict[str, Any]:
        """Return the report as docs/report-schema.md describes it."""
        named = {name: self.part(name) for name in ("client_wait", "connect", "network")}
        return {
            "schema": SCHEMA,
            "run": asdict(self.run),
            "valid": self.valid,
            "invalid_reasons": list(self.invalid_reasons),
            "verdict": asdict(self.verdict),
            "tail": None if self.tail is None else asdict(self.tail),
            "client": asdict(self.client),
            "total": _part(self.total, "part", "parts"),
            "parts": [_part(part, "part", "parts") for part in self.parts],
            "stages": [_part(part, "stage", "sub_stages") for part in self.stages],
            **{name: _part(part, "part", "parts") for name, part in named.items()},
            "unexplained": _part(self.part("unexplained"), "part", "parts"),
            "waits": [asdict(wait) for wait in self.waits],
            "held": [asdict(cell) for cell in self.held],
            "batches": asdict(self.batches),
            "unmatched": asdict(self.unmatched),
            "died": dict(self.died),
            "instrument": asdict(self.instrument),
            "join": asdict(self.join),
            "resources": None if self.resources is None else asdict(self.resources),
        }


_FIGURES = ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "share", "share_slowest")


def _part(part: Part | None, name: str, inner: str) -> dict[str, Any] | None:
    if part is None:
        return None
    return {
        name: part.name,
        "recorded": part.recorded,
        **{key: getattr(part, key) if part.recorded else None for key in _FIGURES},
        **_own(part),
        inner: [_part(each, name, inner) for each in part.inner],
    }


def _own(part: Part) -> dict[str, Any]:
    own = part.own if part.recorded else None
    figures = {
        f"own_{name}": None if own is None else getattr(own, name)
        for name in ("mean_ms", "p50_ms", "p95_ms", "p99_ms", "low_ms", "high_ms")
    }
    return figures | {"waits": {} if own is None else dict(own.waits)}
