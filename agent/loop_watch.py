"""The watchdog of event loops: where one stands still, the stack that holds it is kept.

The middleware's timer writes a tick ten times a second into the recorder file (`loop_ticks`).
A loop that ticked and does not any more, for longer than `STAGESCOPE_LOOP_LIMIT_MS` (default 250)
beyond its period, is blocked: nothing else can say by what while it lasts, so the stacks are
taken at that moment, and kept with the reason `loop_lag`, the loop's thread first.
It works on a thread of the agent's process: in a served process it would be blocked as well.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stagescope.agent.collectors import Collector
from stagescope.agent.notices import LOOP_LAG, Notice
from stagescope.agent.stack_dumps import ASK_S, LOOPS, PY_SPY_S, StackDumps, runs_a_loop
from stagescope.agent.stack_samplers import Target
from stagescope.errors import StagescopeError, UsageError
from stagescope.stacks import Frame, StackSpan, frame_text

if TYPE_CHECKING:
    from stagescope.agent.loop import Agent

VARIABLE = "STAGESCOPE_LOOP_LIMIT_MS"
"""`off`: no watchdog."""
LIMIT_MS = 250
TICK_NS = 100_000_000
"""`middleware/watch.py PERIOD_S`."""
LOOK_S = 0.05
IDLE_S = 0.5
"""Between two looks while no process has an event loop."""
QUIET_NS = 10_000_000_000
"""Between two dumps of one process."""

_STANDARD = ("/lib/python3", "/lib64/python3", "<frozen ")

_log = logging.getLogger("stagescope")


def make(agent: Agent, environment: Mapping[str, str] = os.environ) -> Sequence[Collector]:
    """Make the watchdog. Raises UsageError where the limit is no number of milliseconds."""
    text = environment.get(VARIABLE, "") or str(LIMIT_MS)
    if text == "off":
        return ()
    try:
        limit_ms = float(text)
    except ValueError:
        raise UsageError(f"{VARIABLE} is {text!r}; it is milliseconds, or off") from None
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
        self, agent: Agent, limit_ns: int, clock: Callable[[], int] = time.monotonic_ns
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
                f"an event loop of process {target.pid} stands still, but {problem}", "failed"
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
            f"{sentence}; said once for each place, all are kept as stacks with the reason "
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
    """Give the innermost frame that is not the standard library's or a package's; else the last."""
    own = [frame for frame in frames if not any(part in frame.file for part in _STANDARD)]
    return own[-1] if own else frames[-1]


def _is_stopped(pid: int) -> bool:
    """Tell whether a process is stopped by a signal or a debugger: then it is not its loop's fault."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return False  # not to be seen from here
    return state[:1] in (["T"], ["t"])
