"""The watchdog of event loops: where one is blocked, the stack that holds it is kept.

The middleware's timer writes a tick ten times a second into the recorder file (`loop_ticks`).
A loop that ticked and does not any more, for longer than `STAGESCOPE_LOOP_LIMIT_MS` (default 250)
beyond its period, is blocked: nothing else can say by what while it lasts, so the stacks are
taken at that moment, and kept with the reason `loop_lag`, the loop's thread first.
It works on a thread of the agent's process: in a served process it would be blocked as well.
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from stagescope import settings
from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.agent.events import LOOP_LAG, EventQueue, Notice
from stagescope.agent.host.proc import process_stat
from stagescope.agent.stacks.in_process import InProcess, StackSampler, Target
from stagescope.agent.stacks.labels import RawStack, StageLabels
from stagescope.agent.stacks.permissions import why_not
from stagescope.agent.stacks.py_spy import PySpy, find_py_spy
from stagescope.errors import StagescopeError
from stagescope.records import Process
from stagescope.stacks import Frame, StackSpan, frame_text, is_library

ASK_S = 0.1
"""A process that runs Python answers within its switch interval, 5 ms; one in C code may not."""
PY_SPY_S = 2.0


class StackDumps:
    """Takes dumps; waits up to ASK_S + PY_SPY_S, so not from the agent's loop."""

    def __init__(self) -> None:
        self._labels = StageLabels()
        self._own = InProcess()
        self._readable: dict[Path, bool] = {}

    def prepare(self, target: Target) -> None:
        """Find out whether py-spy may read *target*, while it can still be asked for leave."""
        if target.ring not in self._readable:
            self._readable[target.ring] = not why_not(target)

    def forget(self, ring: Path) -> None:
        """Forget a process that is gone."""
        self._readable.pop(ring, None)

    def take(self, target: Target, reason: str) -> list[StackSpan]:
        """Return the stacks of *target* now, the thread of an event loop first.

        Raises StagescopeError, one sentence, where nobody can look.
        """
        raws, how = self._raws(target)
        return self._labels.label(target.pid, sorted(raws, key=_is_no_loop), reason, how)

    def _raws(self, target: Target) -> tuple[Sequence[RawStack], str]:
        self.prepare(target)
        ways: list[tuple[StackSampler, float]] = [(self._own, ASK_S)]
        py_spy = find_py_spy() if self._readable[target.ring] else None
        if py_spy is not None:
            ways.append((PySpy(py_spy, Path("/")), PY_SPY_S))  # a dump needs no folder
        problems = []
        for sampler, patience_s in ways:
            try:
                return sampler.dump(target, patience_s), sampler.how
            except StagescopeError as problem:
                problems.append(str(problem))
        raise StagescopeError("; ".join(problems))


def runs_a_loop(frames: Sequence[tuple[str, str, int]]) -> bool:
    """Return whether a thread runs an event loop: asyncio's, or uvloop's by asyncio's runner."""
    return any(
        function.rpartition(".")[2] in LOOPS or file.endswith("asyncio/runners.py")
        for function, file, _ in frames
    )


LOOPS = ("run_forever", "_run_once", "run_until_complete")


def _is_no_loop(raw: RawStack) -> bool:
    return not runs_a_loop(raw.frames)


TICK_NS = 100_000_000
"""`middleware/runtime/pauses.py PERIOD_S`."""
LOOK_S = 0.05
IDLE_S = 0.5
"""Between two looks while no process has an event loop."""
QUIET_NS = 10_000_000_000
"""Between two dumps of one process."""

_log = logging.getLogger("stagescope")


def make(agent: AgentContext, environment: Mapping[str, str] = os.environ) -> Sequence[Collector]:
    """Make the watchdog; none where the limit is `off`."""
    limit_ms = settings.LOOP_LIMIT_MS.number(environment)
    if math.isinf(limit_ms):
        return ()
    return (LoopWatch(agent, int(limit_ms * 1e6)),)


@dataclass(slots=True)
class _Loop:
    """One process's loops, as their ticks tell of them."""

    ticks: int
    since_ns: int
    """When the newest tick was seen."""
    told: bool = False
    """It stood still and was looked at; again only after another tick."""
    quiet_until_ns: int = 0


class LoopWatch:
    """The collector; it looks on a thread of its own, which its first call starts."""

    name = "watchdog"
    period_s = 1.0

    def __init__(
        self, agent: AgentContext, limit_ns: int, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._agent = agent
        self._limit_ns = limit_ns
        self._clock = clock
        self._loops: dict[Path, _Loop] = {}
        self._dumps = StackDumps()
        self._said: set[str] = set()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def collect(self) -> None:
        """Start the thread."""
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._live, name="stagescope-watchdog", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(ASK_S + PY_SPY_S + 1.0)

    def _live(self) -> None:
        while not self._stopped.is_set():
            self.look()
            if any(loop.ticks for loop in self._loops.values()):
                time.sleep(LOOK_S)  # half of what Event.wait costs, which is all that this costs
            else:
                self._stopped.wait(IDLE_S)

    def look(self) -> None:
        """Look at every loop once."""
        present = self._agent.loop_ticks()
        now_ns = self._clock()
        for ring, process, ticks in present:
            loop = self._loops.setdefault(ring, _Loop(ticks, now_ns))
            if ticks != loop.ticks:
                loop.ticks, loop.since_ns, loop.told = ticks, now_ns, False
                self._dumps.prepare(Target(ring, process))
            elif ticks and not loop.told and self._late_ns(loop, now_ns) > self._limit_ns:
                loop.told = True
                self._stands_still(Target(ring, process), loop)
        for ring in self._loops.keys() - {ring for ring, _, _ in present}:
            del self._loops[ring]
            self._dumps.forget(ring)

    def _late_ns(self, loop: _Loop, now_ns: int) -> int:
        return now_ns - loop.since_ns - TICK_NS

    def _stands_still(self, target: Target, loop: _Loop) -> None:
        now_ns = self._clock()
        if now_ns < loop.quiet_until_ns:
            self._agent.evidence.count("loop_dumps_withheld")
            return
        if _is_stopped(target.pid):
            return
        try:
            spans = self._dumps.take(target, LOOP_LAG)
        except StagescopeError as problem:
            self._agent.evidence.count("loop_dumps_failed")
            self._say_once(
                f"an event loop of process {target.pid} is blocked, but {problem}", "failed"
            )
            return
        if not spans or not runs_a_loop(spans[0].frames) or _waits_for_work(spans[0]):
            return  # A loop that has ended, or that went on meanwhile.
        loop.quiet_until_ns = now_ns + QUIET_NS
        self._agent.evidence.stacks.add(spans)
        self._agent.evidence.count("loop_dumps")
        self._tell(target, spans[0], self._late_ns(loop, now_ns))

    def _tell(self, target: Target, blocked: StackSpan, late_ns: int) -> None:
        culprit = frame_text(culprit_of(blocked.frames))
        sentence = (
            f"the event loop of {target.process.service} (process {target.pid}) has stood still "
            f"for {late_ns / 1e6:.0f} ms in {culprit}"
        )
        self._agent.notices.put(Notice(LOOP_LAG, target.pid, "", self._clock(), sentence))
        self._say_once(
            f"{sentence}; logged once for each place, all are kept as stacks with the reason "
            f"{LOOP_LAG}",
            culprit,
        )

    def _say_once(self, sentence: str, key: str) -> None:
        if key not in self._said and len(self._said) < 1000:
            self._said.add(key)
            _log.warning("%s", sentence)


def _waits_for_work(span: StackSpan) -> bool:
    leaf = span.frames[-1]
    name = leaf.function.rpartition(".")[2]
    return name in ("select", *LOOPS) or leaf.file.endswith("asyncio/runners.py")


def culprit_of(frames: Sequence[Frame]) -> Frame:
    """Return the innermost frame that is not the standard library's or a package's; else the last."""
    own = [frame for frame in frames if not is_library(frame.file)]
    return own[-1] if own else frames[-1]


def _is_stopped(pid: int) -> bool:
    """Return whether a process is stopped by a signal or a debugger: then it is not its loop's fault."""
    found = process_stat("/proc", pid)
    return found is not None and found.state in ("T", "t")


Waits = Mapping[str, int]
"""`recorder_format.WAITS` of one process."""

STILL_S: Final = 0.4
"""A loop that ticks ten times a second and has not for this long is blocked now."""
LAG_SHARE: Final = 0.25
"""Of the time since the last look: a loop that was late by so much in all lags."""


@dataclass(slots=True)
class _Seen:
    ticks: int
    lag_ns: int
    ticked_ns: int
    """When the ticks were last seen to have grown."""
    told: bool = False
    """That it is blocked was reported, and it has not ticked since."""


class LagWatch:
    """Looks at the loops of all live processes; the best time to look closer is while one lags."""

    def __init__(
        self, notices: EventQueue, waits: Callable[[], Sequence[tuple[Process, Waits]]]
    ) -> None:
        self._notices = notices
        self._waits = waits
        self._seen: dict[str, _Seen] = {}

    def look(self, now_ns: int) -> None:
        """Compare with the last look."""
        alive = self._waits()
        for process, waits in alive:
            self._compare(process, waits, now_ns)
        for ring_id in self._seen.keys() - {process.ring_id for process, _ in alive}:
            del self._seen[ring_id]

    def _compare(self, process: Process, waits: Waits, now_ns: int) -> None:
        ticks, lag_ns = waits["loop_ticks"], waits["loop_lag_ns"]
        seen = self._seen.get(process.ring_id)
        if seen is None or not ticks:  # a process without an event loop has no ticks
            self._seen[process.ring_id] = _Seen(ticks, lag_ns, now_ns)
            return
        if ticks == seen.ticks:
            self._stands_still(process, seen, now_ns)
            return
        late_ns = lag_ns - seen.lag_ns
        # Where its standing still was told, the lag that it then owns up to is no news.
        if not seen.told and late_ns > LAG_SHARE * (now_ns - seen.ticked_ns):
            self._tell(process, now_ns,
                       f"was late by {late_ns / 1e6:.0f} ms in {ticks - seen.ticks} ticks within "
                       f"{(now_ns - seen.ticked_ns) / 1e6:.0f} ms")  # fmt: skip
        self._seen[process.ring_id] = _Seen(ticks, lag_ns, now_ns)

    def _stands_still(self, process: Process, seen: _Seen, now_ns: int) -> None:
        still_ns = now_ns - seen.ticked_ns
        if still_ns >= STILL_S * 1e9 and not seen.told:
            seen.told = True
            self._tell(process, now_ns, f"has stood still for {still_ns / 1e6:.0f} ms")

    def _tell(self, process: Process, now_ns: int, what: str) -> None:
        sentence = f"the event loop of {process.service} (pid {process.pid}) {what}"
        self._notices.put(Notice(LOOP_LAG, process.pid, "", now_ns, sentence))
