"""The served process as its own stack sampler, asked by its probe: where py-spy may not read it.

It costs the server about 0.1 ms a tick (py-spy costs it nothing), and sees nothing while C code
holds the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from stagescope.agent.probe import ask, converse, probe_of
from stagescope.agent.stacks.labels import OUR_THREADS, RawStack
from stagescope.errors import StagescopeError
from stagescope.records import Process
from stagescope.stacks import Frame, ThreadCpu


@dataclass(frozen=True, slots=True)
class Target:
    """A served process, as `Agent.alive` gives it."""

    ring: Path
    process: Process

    @property
    def pid(self) -> int:
        """Its process id, as it sees it itself."""
        return self.process.pid


class Window(Protocol):
    """Sampling of one process that is going on."""

    target: Target

    @property
    def cpu_s(self) -> float:
        """CPU seconds that it has cost the agent's side so far, beside the thread that polls."""
        ...

    def poll(self) -> Sequence[RawStack] | None:
        """Return what was seen once it is over, None until then; never waits.

        Raises StagescopeError, one sentence, where it failed.
        """
        ...

    @property
    def thread_cpu(self) -> Sequence[ThreadCpu]:
        """CPU times of the process's threads, read while the window lasted; whole once it is over."""
        ...

    def finish(self) -> None:
        """End it now; `poll` returns what was seen so far."""

    def close(self) -> None:
        """Cancel it, and remove all of it."""


class StackSampler(Protocol):
    """One way to see stacks."""

    @property
    def how(self) -> str:
        """`StackSpan.how`."""
        ...

    @property
    def error_ns(self) -> int:
        """How far the times of what it sees may be off."""
        ...

    def begin(self, target: Target, seconds: float, pace: float = 1.0) -> Window:
        """Begin to sample *target* for *seconds*, at *pace* times the rate. Raises StagescopeError."""
        ...

    def dump(self, target: Target, timeout_s: float) -> Sequence[RawStack]:
        """Return the stacks of this moment, waiting *timeout_s* at most. Raises StagescopeError."""
        ...


RATE_HZ = 20
ANSWER_S = 5.0
"""How long the process may keep us waiting for one answer; it gives two a second."""


class InProcess:
    """Samples by way of the probe."""

    how = "in-process"
    error_ns = 1_000_000

    def begin(self, target: Target, seconds: float, pace: float = 1.0) -> InProcessWindow:
        """Begin to ask *target*."""
        return InProcessWindow(target, seconds, RATE_HZ * pace)

    def dump(self, target: Target, timeout_s: float) -> list[RawStack]:
        """Ask for the stacks of this moment. Raises StagescopeError."""
        return list(raw_stacks(ask(probe_of(target.ring), "dump", timeout_s=timeout_s)))


class InProcessWindow:
    """One conversation with the probe, on a thread of its own."""

    cpu_s = 0.0
    """The server has it."""

    def __init__(self, target: Target, seconds: float, rate_hz: float) -> None:
        self.target = target
        self._rate_hz = rate_hz
        self._seconds = seconds
        self._raws: list[RawStack] = []
        self.thread_cpu: list[ThreadCpu] = []
        self._problem: StagescopeError | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(
            target=self._converse, name="stagescope-stacks", daemon=True
        )
        self._thread.start()

    def _converse(self) -> None:
        answers = converse(
            probe_of(self.target.ring), "stacks", timeout_s=ANSWER_S, seconds=self._seconds,
            hz=self._rate_hz,
        )  # fmt: skip
        try:
            with closing(answers):
                for answer in answers:
                    self._raws += raw_stacks(answer)
                    self.thread_cpu += thread_cpu(answer)
                    if self._finished.is_set():
                        return
        except StagescopeError as problem:
            self._problem = problem

    def poll(self) -> Sequence[RawStack] | None:
        """Return what was seen once it is over (`Window`)."""
        if self._thread.is_alive():
            return None
        if self._problem is not None and not self._raws:
            raise self._problem
        return self._raws

    def finish(self) -> None:
        """End it with the next answer (`Window`)."""
        self._finished.set()

    def close(self) -> None:
        """End the conversation: it answers twice a second (`Window`)."""
        self._finished.set()
        self._thread.join(ANSWER_S + 1.0)


def thread_cpu(answer: Mapping[str, Any]) -> Iterator[ThreadCpu]:
    """Read the CPU times in one answer of the op `stacks`; a server of an older version has none."""
    ours = {str(id) for id, name in answer["threads"].values() if name.startswith(OUR_THREADS)}
    for at_ns, used_ns in answer.get("cpu", ()):
        yield ThreadCpu(at_ns, {int(t): used for t, used in used_ns.items() if t not in ours})


def raw_stacks(answer: Mapping[str, Any]) -> Iterator[RawStack]:
    """Read one answer of the ops `stacks` and `dump`."""
    frames = [Frame(*frame) for frame in answer["frames"]]
    stacks = [tuple([frames[place] for place in places]) for places in answer["stacks"]]
    for ident, stack, start_ns, end_ns, samples in answer["spans"]:
        native, name = answer["threads"].get(str(ident), (0, ""))
        yield RawStack(native, name, start_ns, end_ns, samples, stacks[stack])
