"""The agent: drain, collect, save, sleep; the same code as a process and as a thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TypeVar

from stagescope import settings
from stagescope.agent.checkpoint import Checkpoint
from stagescope.agent.collectors import Collector, Metered, PeriodicTask
from stagescope.agent.context import AgentContext
from stagescope.agent.drain import (
    FULL_BATCH,
    GROWING,
    PASSING,
    Cursors,
    Drain,
    load_cursors,
    summed,
)
from stagescope.agent.events import Actions, EventQueue
from stagescope.agent.log_once import LogOnce
from stagescope.agent.overhead import OTHER, Governor, OwnCost, budget
from stagescope.agent.sinks import QueuedSink, Sink, publish_export, withdraw_export
from stagescope.agent.store.live import LiveWindow
from stagescope.agent.store.recent import ColdStarts, RecentRequests
from stagescope.agent.store.runs import RunStore
from stagescope.agent.store.telemetry import TelemetryBuffer
from stagescope.recorder.spool import RUNS_FOLDER
from stagescope.records import Record

SHORTEST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 0.25
DISCOVER_S = 0.5
CHECKPOINT_S = 0.5
TIDY_S = 60.0
KEEP_S = 1800.0
"""How long samples and stacks are kept, and as long as a run that was opened goes on."""
SHARED_BATCH = 32
"""Records that an embedded agent reads before it lets the server run: about half a millisecond."""

LAST_PASSES_S = 2.0
"""How long, after `stop`, an agent reads on where the server writes as fast as it reads."""

RUN_QUIET_S = 3.0
"""A load run without a record for so long is taken to be over."""

T = TypeVar("T")

_log = logging.getLogger("stagescope")


def next_pause_s(last_s: float, *, records: int, more: bool) -> float:
    """Return how long to sleep: not at all where more is waiting, longer the longer nothing came."""
    if more:
        return 0.0
    if records:
        return SHORTEST_PAUSE_S
    return min(LONGEST_PAUSE_S, max(SHORTEST_PAUSE_S, last_s * 1.5))


class _Passes:
    """Counts passes over the recorder files, so that a thread can wait for one that it saw begin."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._begun = self._finished = 0

    def begin(self) -> int:
        """Note that a pass begins; return its number."""
        with self._changed:
            self._begun += 1
            return self._begun

    def finish(self, number: int) -> None:
        """Note that pass *number* has read all that there was."""
        with self._changed:
            self._finished = number
            self._changed.notify_all()

    def wait_for_next(self, timeout_s: float, *, wake: Callable[[], None]) -> bool:
        """Wait until a pass that begins from now on is finished; False where it took longer."""
        with self._changed:
            wanted = self._begun + 1
            wake()
            return self._changed.wait_for(lambda: self._finished >= wanted, timeout_s)


Samplers = Callable[[AgentContext], Sequence[Collector]]
"""Makes the samplers of an agent."""


class Agent:
    """Drains a spool into sinks until it is stopped; the caller holds the spool's lock."""

    def __init__(
        self,
        spool: Path,
        sinks: dict[str, Sink],
        *,
        shared: bool = False,
        samplers: Samplers | None = None,
        holds: Callable[[], bool] = lambda: True,
        clock: Callable[[], int] = time.monotonic_ns,
        cpu_s: Callable[[], float] = time.process_time,
    ) -> None:
        """*shared*: the process is a server's, so every batch ends with giving way to it.

        *samplers* makes the samplers, once the agent can be asked. Where *holds* says that the
        spool is no longer ours, since somebody deleted it, `run` ends and `lost_spool` is True.
        """
        self.spool = spool
        self.lost_spool = False
        self._left_to_others = 0
        self._holds = holds
        self.actions = Actions()
        self.shared = shared
        self.evidence = TelemetryBuffer()
        self.notices = EventQueue()
        self.runs = RunStore(spool / RUNS_FOLDER)
        self.cold_starts = ColdStarts()
        self.recent = RecentRequests()
        self.live = LiveWindow(clock)
        self.sinks: dict[str, Sink] = {
            "runs": self.runs,
            "cold_starts": self.cold_starts,
            "recent": self.recent,
            "live": self.live,
            **sinks,
        }
        self._queued = [sink for sink in self.sinks.values() if isinstance(sink, QueuedSink)]
        self._clock = clock
        self._cpu_s = cpu_s
        self._cpu_before_s = cpu_s()
        self._cpu = 0.0
        cursors = load_cursors(spool)
        self._checkpoint = Checkpoint(spool, self.sinks, cursors, holds=holds)
        self._drain = self._make_drain(cursors)
        self.alive = self._drain.alive
        self.loop_ticks = self._drain.loop_ticks
        self.serving_since = self._drain.serving_since
        self.in_flight = self._drain.in_flight
        self.waits = self._drain.waits
        self.permissions = Governor(
            self.evidence.samples, budget=budget(), run_under_way=self.run_under_way, clock=clock
        )
        made = samplers(self) if samplers else ()
        self._samplers = [Metered(one, clock) for one in (*made, self.permissions)]
        self.permissions.watch(self._samplers)
        self._discover = self._task("discover", DISCOVER_S, self._look_around)
        self._collectors = self._make_collectors()
        self._stopping = False
        self._wake = threading.Event()
        self._passes = _Passes()
        self._counts = {"faults": 0, "sleeps": 0, "late_ns": 0}
        self._late_max_ns = 0
        self._logged = LogOnce()
        for sink in self._queued:
            sink.call_when_settled(self._checkpoint.save_settled)

    def _make_drain(self, cursors: Cursors) -> Drain:
        return Drain(
            self.spool,
            cursors,
            batch=SHARED_BATCH if self.shared else FULL_BATCH,
            give_way=_release_the_interpreter if self.shared else _go_on,
            has_room=lambda: all(sink.has_room for sink in self._queued),
            note=self._checkpoint.note,
            recall=self._recall,
            clock=self._clock,
        )

    def _make_collectors(self) -> list[Metered]:
        save = partial(self._checkpoint.advance, self._drain)
        own_cost = OwnCost(self.evidence.samples, self._own_cpu_s, self._clock)
        return [
            self._discover,
            *self._samplers,
            self._task("tidy", TIDY_S, self._tidy),
            self._task("checkpoint", CHECKPOINT_S, save),
            Metered(own_cost, self._clock),
        ]

    def _task(self, name: str, period_s: float, do: Callable[[], None]) -> Metered:
        return Metered(PeriodicTask(name, period_s, do), self._clock)

    def _tidy(self) -> None:
        self.runs.forget_old()
        opened_s = time.time() - self.runs.opened_since_s()
        self.evidence.forget_before(self._clock() - int(max(KEEP_S, opened_s) * 1e9))

    def run(self) -> None:
        """Work until `stop` is called; then read what is there. `close` is still to be called."""
        pause_s = SHORTEST_PAUSE_S
        while not self._stopping:
            before = self._drain.records
            more = self.step()
            more = more and not self._drain.held
            pause_s = next_pause_s(pause_s, records=self._drain.records - before, more=more)
            self._sleep(pause_s)
        last_ns = self._clock() + int(LAST_PASSES_S * 1e9)
        self.hurry()
        while self.step() and self._clock() < last_ns:
            if self._drain.held:
                time.sleep(SHORTEST_PAUSE_S / 5)

    def _look_around(self) -> None:
        """Find new files, as long as the spool is ours: else they are another agent's."""
        if not self.lost_spool and not self._holds():
            self.lost_spool = True
            self._left_to_others = self._drain.leave_existing()
            _log.warning(
                "spool %s, or the lock in it, was deleted while it was read: what was in it and "
                "not read is lost", self.spool,
            )  # fmt: skip
            self.stop_soon()
        if not self.lost_spool:
            publish_export(self.spool, self.sinks)
            self._drain.discover()

    def stop(self) -> None:
        """Make `run` return now; from any thread, but not from a signal's handler."""
        self._stopping = True
        self._wake.set()

    def stop_soon(self) -> None:
        """Make `run` return after its pause; takes no lock, so signals may call it."""
        self._stopping = True

    def hurry(self) -> None:
        """Make everything due at the next step."""
        for collector in self._collectors:
            collector.due_ns = 0

    def close(self, timeout_s: float = 5.0) -> None:
        """Flush every sink, save how far the spool is read, close the files.

        Where another agent reads the same files from where we saved, what waits is left to it.
        """
        deadline = self._clock() + int(timeout_s * 1e9)
        if not self.lost_spool:
            withdraw_export(self.spool)
        for collector in self._collectors:
            self._guarded(f"ending {collector.name}", collector.close)
        for name, sink in self.sinks.items():
            left_s = 0.0 if self._left_to_others else max(0.1, (deadline - self._clock()) / 1e9)
            self._guarded(f"closing {name}", partial(sink.close, left_s))
        self._checkpoint.advance(self._drain)
        self._drain.close()

    def step(self) -> bool:
        """Do what is due and read every file once; True where more is waiting."""
        number = self._passes.begin()
        now = self._clock()
        for collector in self._collectors:
            if now >= collector.due_ns:
                self._guarded(f"collecting {collector.name}", partial(collector.collect, now))
        more = self._guarded("reading recorder files", partial(self._drain.poll, self._deliver))
        self._cpu = self._cpu_s()
        if not more:
            self._passes.finish(number)
        return bool(more)

    def catch_up(self, timeout_s: float = 2.0) -> bool:
        """Wait until all that was committed before this call is read; False where it took longer.

        So that an answer about a load run holds what its server had finished when it was asked.
        """
        self._discover.due_ns = 0  # also in files that are new
        return self._passes.wait_for_next(timeout_s, wake=self._wake.set)

    def counters(self) -> dict[str, float]:
        """Return what only grows: the agent's own counts, the writers' and the sinks'."""
        drained = self._drain.counters()
        faults = drained.pop("faults")
        of_sinks = {
            f"{name}_{key}": value
            for name, sink in self.sinks.items()
            for key, value in sink.counters().items()
        }
        return {
            **drained,
            **summed(self._drain.waits().values(), GROWING),
            "writer_faults": faults,
            **self._counts,
            "cursor_failures": self._checkpoint.failures,
            "cpu_s": self._cpu,
            **self.evidence.counters(),
            **self.notices.counters(),
            **self.permissions.counters(),
            **{key: n for one in self._samplers for key, n in one.counters().items()},
            **of_sinks,
        }

    def gauges(self) -> dict[str, float]:
        """Return what comes and goes: open recorder files, what the middleware costs, worst lateness."""
        cost = self._drain.cost()
        return (
            {
                "rings": self._drain.rings(),
                "in_flight": sum(self._drain.in_flight().values()),
                "late_max_ns": self._late_max_ns,
                "request_base_ns": cost.base_ns,
                "request_stage_ns": cost.stage_ns,
                **summed(self._drain.waits().values(), PASSING),
            }
            | self.runs.gauges()
            | self.evidence.samples.gauges()
            | self.permissions.gauges()
        )

    def costs(self) -> dict[str, dict[str, float]]:
        """Return what each collector has cost so far, by its name; from any thread."""
        return {one.name: one.figures() for one in self._collectors}

    def _own_cpu_s(self) -> dict[str, float]:
        used_s = {name: cost["cpu_s"] for name, cost in self.costs().items()}
        in_collectors_s = sum(one.thread_cpu_s for one in self._collectors)
        return used_s | {OTHER: self._cpu_s() - self._cpu_before_s - in_collectors_s}

    def run_under_way(self) -> bool:
        """Return whether records of a load run came in the last few seconds."""
        return self.runs.under_way(RUN_QUIET_S)

    def _deliver(self, records: Sequence[Record]) -> None:
        for name, sink in self.sinks.items():
            self._guarded(f"giving records to {name}", partial(sink.accept, records))

    def _recall(self, records: Sequence[Record]) -> None:
        for sink in self._queued:
            self._guarded("recalling batches", partial(sink.recall, records))

    def _sleep(self, pause_s: float) -> None:
        if not pause_s:
            return
        meant = self._clock() + int(pause_s * 1e9)
        if self._wake.wait(pause_s):
            self._wake.clear()
            return
        late = max(0, self._clock() - meant)
        self._counts["late_ns"] += late
        self._late_max_ns = max(late, self._late_max_ns)
        self._counts["sleeps"] += 1

    def _guarded(self, doing: str, call: Callable[[], T]) -> T | None:
        """The one guard: a fault in one part is counted, logged once, and ends no other part."""
        try:
            return call()
        except Exception:
            if settings.RAISE.on():
                raise
            self._counts["faults"] += 1
            if self._logged.is_first(doing):
                _log.exception(
                    "the agent's own fault while %s; logged once, counted as faults", doing
                )
            return None


def _release_the_interpreter() -> None:
    """Yield the interpreter's lock to a thread that waits for it."""
    time.sleep(0)


def _go_on() -> None:
    """Nobody waits in a process of our own."""
