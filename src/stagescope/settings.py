"""Every `STAGESCOPE_*` variable: its default, what it may be, and what it does.

A variable is read when it is needed, here and nowhere else. In a served process a wrong value is
logged once and its default counts; `stagescope agent` asks `problems` first and refuses to start.
`scripts/pages` prints docs/configuration.md from here.
"""

from __future__ import annotations

import os

# Every Python process below `stagescope run` imports this at its start: what costs more than all
# of this (`logging`, `typing`) is imported where it is needed.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

PREFIX = "STAGESCOPE_"
SERVER, AGENT, BOTH, TESTS = "served process", "agent", "both", "tests"
OFF_WORDS = ("0", "off", "no", "false")
SAMPLER_NAMES = ("gpu", "host", "torch", "kernels", "triggers", "stacks", "watchdog")
TRIGGER_NAMES = ("slow", "loop_lag", "oom", "throttle", "xid")
LONGEST = 80

_warned: set[str] = set()


class Setting:
    """One variable. *allowed* is empty where any text will do; *form* says what text that is."""

    __slots__ = ("allowed", "default", "form", "help", "is_number", "known", "name", "read_by")

    def __init__(
        self,
        name: str,
        default: str,
        help: str,
        *,
        read_by: str,
        allowed: tuple[str, ...] = (),
        form: str = "",
        known: tuple[str, ...] = (),
        is_number: bool = False,
    ) -> None:
        """*known* are the names that a list of names may have."""
        self.name = PREFIX + name
        self.default = default
        self.help = help
        self.read_by = read_by
        self.allowed = allowed
        self.known = known
        self.is_number = is_number
        self.form = form or " or ".join(f"`{value}`" for value in allowed)

    def text(self, environ: Mapping[str, str] = os.environ) -> str:
        """Return the value as it is; empty where it is not set."""
        return environ.get(self.name, "").strip()

    def on(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Return whether a switch is on: set to anything but `0`, `off`, `no`, `false`."""
        return (self.text(environ) or self.default).lower() not in OFF_WORDS

    def choice(self, environ: Mapping[str, str] = os.environ) -> str:
        """Return the value, one of `allowed`; the default where it is not set or none of them."""
        value = self.text(environ).lower()
        if not value or value in self.allowed:
            return value or self.default
        return self._wrong(value)

    def number(self, environ: Mapping[str, str] = os.environ) -> float:
        """Return a number above 0; infinite for `off`."""
        value = self.text(environ).lower() or self.default
        number = _positive(value)
        return number or float(self._wrong(value))

    def names(self, environ: Mapping[str, str] = os.environ) -> tuple[str, ...]:
        """Return the names between commas; the default's where it is not set or one is unknown."""
        if self.problem(environ):
            return _names(self._wrong(self.text(environ)))
        return _names(self.text(environ) or self.default)

    def problem(self, environ: Mapping[str, str]) -> str:
        """Return one sentence on what is wrong with the value; empty where nothing is."""
        value = self.text(environ).lower()
        if not value:
            return ""
        if self.is_number:
            wrong = value not in self.allowed and not _positive(value)
        elif self.known:
            names = _names(self.text(environ))
            wrong = names != ("off",) and not set(names) <= set(self.known)
        else:
            wrong = bool(self.allowed) and value not in self.allowed
        return self._sentence(self.text(environ)) if wrong else ""

    def _wrong(self, value: str) -> str:
        if self.name not in _warned:
            from logging import getLogger

            _warned.add(self.name)
            getLogger("stagescope").warning(
                "%s; %s counts", self._sentence(value), self.default or "its default"
            )
        return self.default

    def _sentence(self, value: str) -> str:
        return f"{self.name}={printable(value)}: give {self.form.replace('`', '')}"


def printable(value: str) -> str:
    """Return *value* short and without characters that would steer a terminal."""
    short = value if len(value) <= LONGEST else value[:LONGEST] + "..."
    return short if short.isprintable() else ascii(short)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _positive(value: str) -> float:
    """Return the number, infinite for `off`; 0 where it is not a number above 0."""
    try:
        number = float("inf") if value == "off" else float(value)
    except ValueError:
        return 0.0
    return number if number > 0 and (value == "off" or number < float("inf")) else 0.0


def _some_of(names: tuple[str, ...]) -> str:
    return f"some of {', '.join(f'`{name}`' for name in names)}, or `off`"


def _switch(name: str, default: str, help: str, *, read_by: str) -> Setting:
    return Setting(name, default, help, read_by=read_by, form="`1` or `0`")


SPOOL = Setting(
    "SPOOL", "", "The folder of the recorder files; without it one per user, in memory where "
    "there is room (docs/agent.md).", read_by=BOTH, form="a folder",
)  # fmt: skip
DISABLE = _switch(
    "DISABLE", "0", "Turns stagescope off: every request goes straight to the app.",
    read_by=SERVER,
)  # fmt: skip
EMBEDDED_AGENT = Setting(
    "AGENT", "on", "`thread`: the agent that a served process starts is a thread of it and no "
    "process of its own; `off`: none is started, run `stagescope agent` (docs/agent.md).",
    read_by=SERVER, allowed=("on", "thread", "off"),
)  # fmt: skip
METRICS_PORT = Setting(
    "METRICS_PORT", "", "Where the agent serves `/metrics` for Prometheus; one inside a served "
    "process, or beside `stagescope run`, serves none without it (docs/exporters.md).",
    read_by=BOTH, form="`PORT` or `HOST:PORT`",
)  # fmt: skip
EXCLUDED_URLS = Setting(
    "EXCLUDED_URLS", "", "Requests without a trace, by their path: probes, scrapes; beside those of "
    "OpenTelemetry's `OTEL_PYTHON_EXCLUDED_URLS` (docs/exporters.md).", read_by=AGENT,
    form="regular expressions with commas between",
)  # fmt: skip
EXCLUDED_FROM = Setting(
    "EXCLUDED_FROM", "traces", "`metrics`: what is excluded is not counted either.",
    read_by=AGENT, allowed=("traces", "metrics"),
)  # fmt: skip
PROBE = Setting(
    "PROBE", "on", "`off`: no socket for questions of the agent, so stacks come from py-spy "
    "alone and there are no captures.", read_by=SERVER, allowed=("on", "off"),
)  # fmt: skip
SERVER_TIMING = Setting(
    "SERVER_TIMING", "opened", "Which load runs' requests get the `Server-Timing` response header: "
    "those of runs that an agent or driver opened here, none, or all that name a run.",
    read_by=SERVER, allowed=("opened", "off", "all"),
)  # fmt: skip
APP_SPANS = Setting(
    "APP_SPANS", "auto", "Whether the app's OpenTelemetry spans hang under ours: where both are "
    "exported to one place, always (`1`), or never (`0`) (docs/hooks/fastapi.md).",
    read_by=SERVER, allowed=("auto", "1", "0"),
)  # fmt: skip
INGRESS = Setting(
    "INGRESS", "10", "How far back a proxy's `X-Request-Start` is believed, an hour at most; `0` "
    "ignores it: for a proxy whose clock is not that of this host.", read_by=SERVER,
    allowed=("0", "off"), form="seconds, or `0`", is_number=True,
)  # fmt: skip
HOOKS = Setting(
    "HOOKS", "", "Switches hooks of frameworks and libraries off, for example `-sklearn,-xgboost` "
    "(docs/hooks/README.md).", read_by=SERVER, form="names with a minus before each",
)  # fmt: skip
GIL = _switch(
    "GIL", "0", "Measures the wait for the interpreter's lock, ten times a second (docs/waits.md).",
    read_by=SERVER,
)  # fmt: skip
DEVICE_STAGES = Setting(
    "DEVICE_STAGES", "inference", "Stages whose device time is measured (docs/device-time.md).",
    read_by=SERVER, form="names with commas between, or `off`",
)  # fmt: skip
MEMORY_HISTORY = _switch(
    "MEMORY_HISTORY", "0", "Turns torch's history of allocations on, for snapshots that say who "
    "allocated (docs/torch-memory.md).", read_by=SERVER,
)  # fmt: skip
TORCHSERVE_LOG = Setting(
    "TORCHSERVE_LOG", "", "The front end's log, from which queue times are read, where it is not "
    "found by itself.", read_by=SERVER, form="a file",
)  # fmt: skip
SAMPLERS = Setting(
    "SAMPLERS", "", "What the agent samples; all that fit where it runs, if not set.",
    read_by=AGENT, form=_some_of(SAMPLER_NAMES), known=SAMPLER_NAMES,
)  # fmt: skip
STACKS = Setting(
    "STACKS", "runs", "When Python stacks are sampled: while a load run lasts, always, or never "
    "(docs/stacks.md).", read_by=AGENT, allowed=("runs", "always", "off"),
)  # fmt: skip
LOOP_LIMIT_MS = Setting(
    "LOOP_LIMIT_MS", "250", "How long an event loop may be blocked before its stack is taken.",
    read_by=AGENT, form="milliseconds, or `off`", is_number=True,
)  # fmt: skip
KERNELS = Setting(
    "KERNELS", "", "Short kernel captures by the agent itself: where there is a device if not set, "
    "also without one (`micro`), or none.", read_by=AGENT, allowed=("micro", "off"),
)  # fmt: skip
TRIGGERS = Setting(
    "TRIGGERS", "", "What starts a closer look by itself; all, if not set (docs/triggers.md).",
    read_by=AGENT, form=_some_of(TRIGGER_NAMES), known=TRIGGER_NAMES,
)  # fmt: skip
AGENT_BUDGET = Setting(
    "AGENT_BUDGET", "0.01", "What the samplers may use of one core before they are slowed down.",
    read_by=AGENT, form="a share of one core, for example 0.01, or `off`", is_number=True,
)  # fmt: skip
GPU = Setting(
    "GPU", "", "Where GPU readings come from; the first that is there, if not set (docs/gpu.md).",
    read_by=AGENT, allowed=("nvml", "torch", "off"),
)  # fmt: skip
GPM = Setting(
    "GPM", "", "Hardware counters of GPUs: read, or not; if not set, unless a profiler reads them.",
    read_by=AGENT, allowed=("on", "off"),
)  # fmt: skip
GPU_RECORD = Setting(
    "GPU_RECORD", "", "Writes the GPU readings to a file.", read_by=AGENT, form="a file"
)
GPU_REPLAY = Setting(
    "GPU_REPLAY", "", "Takes the GPU readings from such a file.", read_by=AGENT, form="a file"
)
RUN = _switch("RUN", "0", "Set by `stagescope run` for the server that it starts.", read_by=SERVER)
RUN_NOTES = Setting(
    "RUN_NOTES", "", "Set by `stagescope run`: where the served processes note what they hooked.",
    read_by=SERVER, form="a file",
)  # fmt: skip
RAISE = _switch(
    "RAISE", "0", "For tests of stagescope itself: its own faults are raised, not counted.",
    read_by=TESTS,
)  # fmt: skip

SETTINGS = (
    SPOOL, DISABLE, EMBEDDED_AGENT, METRICS_PORT, EXCLUDED_URLS, EXCLUDED_FROM, PROBE, SERVER_TIMING, APP_SPANS, INGRESS, HOOKS,
    GIL, DEVICE_STAGES, MEMORY_HISTORY, TORCHSERVE_LOG, SAMPLERS, STACKS, LOOP_LIMIT_MS, KERNELS,
    TRIGGERS,
    AGENT_BUDGET, GPU, GPM, GPU_RECORD, GPU_REPLAY, RUN, RUN_NOTES, RAISE,
)  # fmt: skip
"""In the order of the page."""


def wrong_values(environ: Mapping[str, str] = os.environ) -> list[str]:
    """Return a sentence for each wrong value of what an agent reads."""
    found = (one.problem(environ) for one in SETTINGS if one.read_by in (AGENT, BOTH))
    return [sentence for sentence in found if sentence]


def problems(environ: Mapping[str, str]) -> Iterator[str]:
    """Yield a sentence for each variable of ours that is unknown or has a wrong value."""
    known = {setting.name: setting for setting in SETTINGS}
    for name in sorted(environ):
        if name.startswith(PREFIX):
            setting = known.get(name)
            sentence = (
                setting.problem(environ)
                if setting
                else f"{printable(name)} is no setting; see docs/configuration.md"
            )
            if sentence:
                yield sentence
