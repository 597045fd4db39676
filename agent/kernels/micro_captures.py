"""Kernels as evidence: micro-captures on a duty cycle, those of a trigger, and those of people.

A micro-capture records two batches of one process, kernels and copies alone, once a minute; the
processes take turns. `STAGESCOPE_KERNELS` says when: `micro`, also where there is no device (then
operators); `off`; unset: where there is a device. What `stagescope capture` and others leave in
the spool (`captures/ID/kernels.ndjson`) is taken up in any case.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock, Thread

from stagescope import settings
from stagescope.agent.collectors import Collector
from stagescope.agent.context import AgentContext
from stagescope.agent.kernels.capture import (
    FOLDER,
    Capture,
    export,
    new_id,
    recorded,
    remove_stale,
)
from stagescope.agent.kernels.rows import ROWS_NAME, Recorded, read_rows
from stagescope.agent.log_once import LogOnce
from stagescope.agent.store.telemetry import TelemetryBuffer
from stagescope.errors import StagescopeError
from stagescope.kernels import CaptureRequest
from stagescope.records import Process
from stagescope.samples import Sample

EVERY_S = 60.0
LOOK_S = 1.0
"""How often the spool is looked through."""
END_S = 10.0
"""What a capture under way gets when the agent ends."""
NVIDIA = Path("/dev/nvidiactl")

MICRO = CaptureRequest(batches=2, seconds=5.0, max_events=10_000, background=True)
ON_A_TRIGGER = CaptureRequest(batches=3, seconds=5.0, deep=True)

Alive = Callable[[], Sequence[tuple[Path, Process]]]


class KernelCaptures:
    """The collector `kernels`."""

    name = "kernels"
    period_s = LOOK_S

    def __init__(
        self,
        spool: Path,
        alive: Alive,
        evidence: TelemetryBuffer,
        *,
        micro: CaptureRequest | None,
        allowed: Callable[[str], bool] = lambda what: True,
        every_s: float = EVERY_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """*micro* is what a micro-capture asks for; None: there are none.

        *allowed* is asked before each, with `micro-capture`.
        """
        self._spool = spool
        self._alive = alive
        self._evidence = evidence
        self._micro = micro
        self._allowed = allowed
        self._every_s = every_s
        self._clock = clock
        self._next_s = clock() + every_s
        self._turn = 0
        self._capture: Capture | None = None
        self._thread: Thread | None = None
        self._lock = Lock()
        self._say = LogOnce("no kernels: ", logging.INFO)

    def collect(self) -> None:
        """Read what others left in the spool; begin a micro-capture where one is due."""
        self._take_up()
        if self._micro is None or self._clock() < self._next_s:
            return
        self._next_s = self._clock() + self._every_s
        alive = self._alive()
        if alive and self._allowed("micro-capture"):
            ring, _ = alive[self._turn % len(alive)]
            self._turn += 1
            self._begin(ring, self._micro, trace=False)

    def start(self, ring: Path, process: Process, reason: str) -> str | None:
        """Begin a capture of *process* because of *reason*, and return its id; None where one runs.

        Its trace stays in the spool: `captures/ID`.
        """
        return self._begin(ring, ON_A_TRIGGER, trace=True)

    def close(self) -> None:
        """End the capture under way; its process goes on without a profiler."""
        with self._lock:
            capture, thread = self._capture, self._thread
        if capture is not None:
            capture.close()
        if thread is not None:
            thread.join(END_S)

    def _begin(self, ring: Path, request: CaptureRequest, *, trace: bool) -> str | None:
        remove_stale(self._spool, time.time())
        with self._lock:
            if self._thread is not None and self._thread.is_alive():
                return None
            capture = self._capture = Capture(ring, request, capture_id=new_id())
            self._thread = Thread(
                target=self._run,
                args=(capture, ring, trace),
                name="stagescope-kernels",
                daemon=True,
            )
            self._thread.start()
        return capture.capture_id

    def _run(self, capture: Capture, ring: Path, trace: bool) -> None:
        kept = False
        try:
            for _ in capture.states():
                pass
            read = capture.read()
            self._keep(recorded(read)[0])
            if trace:
                export(read, ring, capture.folder)
                kept = True
        except StagescopeError as problem:
            self._say(str(problem), about=str(problem).partition(":")[0])
        except OSError as problem:
            self._say(f"{capture.folder} cannot be written: {problem.strerror}")
        finally:
            capture.close()
            capture.discard(but_kept=kept)

    def _take_up(self) -> None:
        for file in self._spool.glob(f"{FOLDER}/*/{ROWS_NAME}"):
            try:
                self._keep(read_rows(file))
            except StagescopeError as problem:
                self._say(str(problem))
            shutil.rmtree(file.parent, ignore_errors=True)

    def _keep(self, kept: Recorded) -> None:
        facts = kept.facts
        self._evidence.kernels.add(kept.rows)
        since_ns, until_ns = facts.profiled_since_ns, facts.profiled_until_ns
        self._evidence.samples.add(
            [
                Sample(
                    "stagescope.capture.recording", since_ns, until_ns,
                    (until_ns - since_ns) / 1e9, facts.pid, detail=facts.capture_id,
                )
            ]
        )  # fmt: skip


def request_for(mode: str, *, device: bool) -> CaptureRequest | None:
    """Return what a micro-capture asks for in *mode*, where there is a *device* or not; None: none."""
    if mode == "off" or (not mode and not device):
        return None
    return replace(MICRO, device_only=not mode)


def make(agent: AgentContext, environment: Mapping[str, str] = os.environ) -> list[Collector]:
    """Make the collector of *agent*."""
    mode = settings.KERNELS.choice(environment)
    made = KernelCaptures(
        agent.spool, agent.alive, agent.evidence, micro=request_for(mode, device=NVIDIA.exists()),
        allowed=agent.permissions.allowed,
    )  # fmt: skip
    agent.actions.capture = made
    return [made]
