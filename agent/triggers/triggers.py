"""Triggers: what was noticed starts one bounded look at the process; see docs/triggers.md."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from stagescope import settings as variables
from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.agent.events import KINDS, SLOW, THROTTLE, Notice
from stagescope.agent.triggers.sources import CgroupOom, NoticeFiles, SlowWatch
from stagescope.files import replace_file
from stagescope.records import Process
from stagescope.samples import Sample

MIN_GAP_S: Final = 60.0
"""Between two of one kind."""
MOST_AN_HOUR: Final = 10
"""Of all kinds together."""

_HOUR_NS: Final = 3600 * 10**9


class TriggerLimits:
    """Remembers what was started in the last hour."""

    def __init__(self) -> None:
        self._last: dict[str, int] = {}
        self._started: deque[int] = deque()

    def allow(self, kind: str, now_ns: int) -> bool:
        """Return whether one of *kind* may be started now."""
        while self._started and now_ns - self._started[0] >= _HOUR_NS:
            self._started.popleft()
        last_ns = self._last.get(kind)
        rested = last_ns is None or now_ns - last_ns >= MIN_GAP_S * 1e9
        return rested and len(self._started) < MOST_AN_HOUR

    def note(self, kind: str, now_ns: int) -> None:
        """Remember that one was started."""
        self._last[kind] = now_ns
        self._started.append(now_ns)


FOLDER: Final = "triggers"
SUFFIX: Final = ".json"
MOST: Final = 100
"""The newest so many reasons stay."""
CAPTURES: Final = "captures"
BESIDE: Final = "reason.json"
"""In the folder of a kernel capture, for as long as that stays."""
KERNELS: Final = "kernels"


@dataclass(frozen=True, slots=True)
class Reason:
    """One thing that a trigger started."""

    id: str
    """Of the capture; of a window of stacks, time and kind."""
    action: str
    """`stacks` or `kernels`."""
    kind: str
    """One of `notices.KINDS`."""
    pid: int
    service: str
    device: str
    noticed_ns: int
    """On the host's monotonic clock, like samples and stacks."""
    started_ns: int
    started_wall_ns: int
    """The same, since the Unix epoch."""
    seconds: float
    """How long it lasts; 0 where the capture ends by itself."""
    sentence: str


def keep_reason(spool: Path, reason: Reason) -> None:
    """Write it, whole or not at all; raises OSError."""
    text = json.dumps(asdict(reason), indent=1) + "\n"
    _write(spool / FOLDER / f"{reason.id}{SUFFIX}", text)
    if reason.action == KERNELS:
        _write(spool / CAPTURES / reason.id / BESIDE, text)
    kept = sorted((spool / FOLDER).glob(f"*{SUFFIX}"), key=lambda one: one.stat().st_mtime_ns)
    for old in kept[:-MOST]:
        old.unlink(missing_ok=True)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, text)


PERIOD_S: Final = 0.5
WINDOW_S: Final = 2.0
"""How long a trigger's window of stacks lasts."""
OF_KERNELS: Final = (SLOW, THROTTLE)
"""Where kernels show more than stacks: after running out of memory or a fault there are none."""
RECENT: Final = 32

_log = logging.getLogger("stagescope")


class Source(Protocol):
    """Looks for something to notice."""

    def look(self, now_ns: int) -> None:
        """Look, quickly, and put what it finds into the agent's notices."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Which notices start something, and what."""

    kinds: tuple[str, ...] = KINDS
    kernels: bool = False


def settings(environment: Mapping[str, str] = os.environ) -> Settings:
    """Read the variables."""
    kernels = variables.KERNELS.choice(environment) == "micro"
    kinds = variables.TRIGGERS.names(environment) or KINDS
    return Settings(() if kinds == ("off",) else kinds, kernels)


class Triggers:
    """Takes notices, and starts for each kind at most one look a minute, ten an hour in all."""

    name = "triggers"
    period_s = PERIOD_S

    def __init__(
        self,
        agent: AgentContext,
        chosen: Settings,
        *,
        sources: Sequence[Source] = (),
        newest: Callable[[], Process | None] = lambda: None,
        clock: Callable[[], int] = time.monotonic_ns,
        wall: Callable[[], int] = time.time_ns,
    ) -> None:
        """*newest* gives the process to look at where a notice names none: the busy one."""
        self._agent = agent
        self._chosen = chosen
        self._sources = sources
        self._newest = newest
        self._clock = clock
        self._wall = wall
        self._limits = TriggerLimits()
        self._recent: deque[Reason] = deque(maxlen=RECENT)
        others = ("ignored", "limited", "gone", "refused", "unkept")
        self._counts: dict[str, int] = dict.fromkeys((*KINDS, *others), 0)

    def collect(self) -> None:
        """Look, and act on what was noticed."""
        now_ns = self._clock()
        for source in self._sources:
            source.look(now_ns)
        for notice in self._agent.notices.take():
            self._act(notice, now_ns)

    def close(self) -> None:
        """What was started ends by itself, or with the sampler that runs it."""

    def counters(self) -> dict[str, int]:
        """Return how many of each kind were started, and what became of the other notices."""
        return dict(self._counts)

    def recent(self) -> list[dict[str, Any]]:
        """Return the newest of what was started, oldest first."""
        return [asdict(reason) for reason in self._recent]

    def _act(self, notice: Notice, now_ns: int) -> None:
        if notice.kind not in self._chosen.kinds:
            self._counts["ignored"] += 1
        elif not self._limits.allow(notice.kind, now_ns):
            self._counts["limited"] += 1
        elif not (target := self._target(notice)):
            self._counts["gone"] += 1
        elif not (reason := self._start(notice, *target, now_ns)):
            self._counts["refused"] += 1
        else:
            self._limits.note(notice.kind, now_ns)
            self._counts[notice.kind] += 1
            self._keep(reason)

    def _target(self, notice: Notice) -> tuple[Path, Process] | None:
        alive = self._agent.alive()
        newest = self._newest()
        pid = notice.pid or (newest.pid if newest else 0)
        named = [(ring, process) for ring, process in alive if process.pid == pid]
        # What is of a device, and nobody has served yet, is looked at in any process.
        return next(iter(named or ([] if notice.pid else alive)), None)

    def _start(self, notice: Notice, ring: Path, process: Process, now_ns: int) -> Reason | None:
        action, seconds = KERNELS, 0.0
        started = self._start_kernels(notice, ring, process)
        if not started:
            action, seconds = "stacks", WINDOW_S
            started = self._start_stacks(notice, ring, process)
        if not started:
            return None
        return Reason(
            started, action, notice.kind, process.pid, process.service, notice.device,
            notice.at_ns, now_ns, self._wall(), seconds, notice.sentence,
        )  # fmt: skip

    def _start_kernels(self, notice: Notice, ring: Path, process: Process) -> str | None:
        capture = self._agent.actions.capture
        if not self._chosen.kernels or capture is None or notice.kind not in OF_KERNELS:
            return None
        if not self._agent.permissions.allowed("capture"):
            return None
        return capture.start(ring, process, notice.kind)

    def _start_stacks(self, notice: Notice, ring: Path, process: Process) -> str | None:
        stacks = self._agent.actions.stacks
        if stacks is None or not self._agent.permissions.allowed("stacks"):
            return None
        if not stacks.window(ring, process, notice.kind, WINDOW_S):
            return None
        begun = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(self._wall() / 1e9))
        return f"{begun}-{notice.kind}-{process.pid}"

    def _keep(self, reason: Reason) -> None:
        _log.info("trigger %s starts %s of pid %d: %s",
                  reason.kind, reason.action, reason.pid, reason.sentence)  # fmt: skip
        self._recent.append(reason)
        at_ns = reason.started_ns
        self._agent.evidence.samples.add(
            [Sample("stagescope.trigger.starts", at_ns, at_ns, 1.0, reason.pid, reason.device,
                    reason.kind)]
        )  # fmt: skip
        try:
            keep_reason(self._agent.spool, reason)
        except OSError as problem:
            self._counts["unkept"] += 1
            _log.warning("the reason of %s is not kept: %s", reason.id, problem)


def make(agent: AgentContext) -> Sequence[Collector]:
    """Make the triggers of *agent*, with everything that looks for something to notice."""
    chosen = settings()
    if not chosen.kinds:
        return ()
    watch = SlowWatch(agent.notices, lambda: triggers.counters())
    sources = (
        NoticeFiles(agent.notices, agent.spool),
        CgroupOom(agent.notices, agent.alive),
    )
    triggers = Triggers(agent, chosen, sources=sources, newest=lambda: watch.newest)
    agent.sinks["triggers"] = watch
    return [triggers]
