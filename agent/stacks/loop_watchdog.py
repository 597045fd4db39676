"""The watchdog of event loops: triggers learn that one is blocked or lags, and by what.

The middleware's timer writes a tick ten times a second into the recorder file (`loop_ticks`), and
by how much each came late (`loop_lag_ns`). A loop that ticked and does not any more, for longer
than `STAGESCOPE_LOOP_LIMIT_MS` (default 250) beyond its period, is blocked: nothing else can say
by what while it lasts, so the stacks are taken at that moment, and kept with the reason
`loop_lag`, the loop's thread first.
In a served process no stacks are taken: the thread that would take them may be blocked as well.
"""

from __future__ import annotations

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
from stagescope.agent.events import LOOP_LAG, Notice
from stagescope.agent.host.proc import process_stat
from stagescope.agent.log_once import LogOnce
from stagescope.agent.stacks.in_process import InProcess, StackSampler, Target
from stagescope.agent.stacks.labels import RawStack, StageLabels
from stagescope.agent.stacks.permissions import why_not
from stagescope.agent.stacks.py_spy import PySpy, find_py_spy
from stagescope.errors import StagescopeError
from stagescope.stacks import Frame, StackSpan, frame_text, is_library

ASK_S = 0.1
"""A process that runs Python answers within its switch interval, 5 ms; one in C code may not."""
PY_SPY_S = 2.0


class StackDumps:
    """Takes stack dumps; waits up to ASK_S + PY_SPY_S, so not in the agent's loop."""

    def __init__(self) -> None:
        self._labels = StageLabels()
        self._own = InProcess()
        self._readable: dict[Path, bool] = {}

    def prepare(self, target: Target) -> None:
        """Find out whether py-spy may read *target*, while it can still be asked for leave."""
        if target.ring not in self._readable:
            self._readable[target.ring] = not why_not(target)

    def forget(self, ring: Path) -> None:
        """Forget a process that has exited."""
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


TICK_NS: Final = 100_000_000
"""`middleware/runtime/pauses.py PERIOD_S`."""
LOOK_S: Final = 0.05
IDLE_S: Final = 0.5
"""Between two looks while no process has an event loop, and within a served process."""
QUIET_NS: Final = 10_000_000_000
"""Between two dumps of one process."""
LAG_WINDOW_NS: Final = 500_000_000
LAG_SHARE: Final = 0.25
"""Of a window: a loop whose ticks were late by so much in all lags."""


def make(agent: AgentContext, environment: Mapping[str, str] = os.environ) -> Sequence[Collector]:
    """Make the watchdog; none where the limit is `off`."""
    limit_ms = settings.LOOP_LIMIT_MS.number(environment)
    if math.isinf(limit_ms):
        return ()
    return (LoopWatchdog(agent, int(limit_ms * 1e6)),)


@dataclass(slots=True)
class _Loop:
    """What the ticks of one process's loops have shown."""

    ticks: int
    ticked_ns: int
    """When the newest tick was seen."""
    window: tuple[int, int, int]
    """When the window in which lag is summed up began, and ticks and lag at that moment."""
    reported: bool = False
    """It was found blocked, and has not ticked since."""
    quiet_until_ns: int = 0


class LoopWatchdog:
    """The collector; beside a server it looks on a thread of its own, which its first call starts."""

    name = "watchdog"

    def __init__(
        self, agent: AgentContext, limit_ns: int, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self.period_s = IDLE_S if agent.shared else 1.0
        self._agent = agent
        self._limit_ns = limit_ns
        self._clock = clock
        self._loops: dict[Path, _Loop] = {}
        self._dumps = None if agent.shared else StackDumps()
        self._log = LogOnce()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None

    def collect(self) -> None:
        """Start the thread; in a served process look now."""
        if self._dumps is None:
            self.look()
        elif self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="stagescope-watchdog", daemon=True
            )
            self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(ASK_S + PY_SPY_S + 1.0)

    def _run(self) -> None:
        while not self._stopped.is_set():
            self.look()
            if any(loop.ticks for loop in self._loops.values()):
                time.sleep(LOOK_S)  # half of what Event.wait costs, which is all that this costs
            else:
                self._stopped.wait(IDLE_S)

    def look(self) -> None:
        """Check every loop once."""
        present = self._agent.loop_ticks()
        now_ns = self._clock()
        for ring, process, ticks, lag_ns in present:
            target = Target(ring, process)
            loop = self._loops.setdefault(ring, _Loop(ticks, now_ns, (now_ns, ticks, lag_ns)))
            if ticks != loop.ticks:
                loop.ticks, loop.ticked_ns = ticks, now_ns
                self._ticked(target, loop, lag_ns)
            elif ticks and not loop.reported and self._late_ns(loop, now_ns) > self._limit_ns:
                loop.reported = True
                self._blocked(target, loop)
        for ring in self._loops.keys() - {ring for ring, *_ in present}:
            del self._loops[ring]
            if self._dumps:
                self._dumps.forget(ring)

    def _late_ns(self, loop: _Loop, now_ns: int) -> int:
        return now_ns - loop.ticked_ns - TICK_NS

    def _ticked(self, target: Target, loop: _Loop, lag_ns: int) -> None:
        if self._dumps:
            self._dumps.prepare(target)
        since_ns, ticks, before_ns = loop.window
        length_ns, late_ns = loop.ticked_ns - since_ns, lag_ns - before_ns
        if length_ns < LAG_WINDOW_NS and not loop.reported:
            return
        # By how much a tick is late after the loop was blocked was reported already.
        if not loop.reported and late_ns > LAG_SHARE * length_ns:
            self._notify(target, f"was late by {late_ns / 1e6:.0f} ms in {loop.ticks - ticks} ticks"
                                 f" within {length_ns / 1e6:.0f} ms")  # fmt: skip
        loop.reported, loop.window = False, (loop.ticked_ns, loop.ticks, lag_ns)

    def _blocked(self, target: Target, loop: _Loop) -> None:
        """Find out what blocks it, and notify triggers, also where that cannot be found out."""
        found_ns = self._clock()
        if _is_stopped(target.pid):
            return
        where = ""
        if self._dumps is None:
            pass
        elif found_ns < loop.quiet_until_ns:
            self._agent.evidence.count("loop_dumps_withheld")
        else:
            try:
                spans = self._dumps.take(target, LOOP_LAG)
            except StagescopeError as problem:
                self._agent.evidence.count("loop_dumps_failed")
                self._log(f"an event loop of process {target.pid} is blocked, but {problem}",
                          about="failed")  # fmt: skip
            else:
                if not spans or not runs_a_loop(spans[0].frames) or _waits_for_work(spans[0]):
                    return  # A loop that has ended, or that went on meanwhile.
                loop.quiet_until_ns = self._clock() + QUIET_NS
                self._agent.evidence.stacks.add(spans)
                self._agent.evidence.count("loop_dumps")
                where = frame_text(culprit_of(spans[0].frames))
        late_ms = self._late_ns(loop, found_ns) / 1e6
        sentence = self._notify(
            target, f"is blocked for {late_ms:.0f} ms" + (f" in {where}" if where else "")
        )
        if where:
            self._log(f"{sentence}; logged once for each place, all are kept as stacks with the "
                      f"reason {LOOP_LAG}", about=where)  # fmt: skip

    def _notify(self, target: Target, what: str) -> str:
        sentence = f"the event loop of {target.process.service} (process {target.pid}) {what}"
        self._agent.notices.put(Notice(LOOP_LAG, target.pid, "", self._clock(), sentence))
        return sentence


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
