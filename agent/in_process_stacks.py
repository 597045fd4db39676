"""The served process as its own stack sampler, asked by its probe: where py-spy may not read it.

It costs the server about 0.1 ms a tick (py-spy costs it nothing), and sees nothing while C code
holds the interpreter's lock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from typing import Any

from stagescope.agent.probe_client import ask, probe_of, talk
from stagescope.agent.stack_samplers import Target
from stagescope.agent.stage_labels import RawStack
from stagescope.errors import StagescopeError
from stagescope.stacks import Frame

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
        self._problem: StagescopeError | None = None
        self._finished = threading.Event()
        self._thread = threading.Thread(
            target=self._converse, name="stagescope-stacks", daemon=True
        )
        self._thread.start()

    def _converse(self) -> None:
        answers = talk(
            probe_of(self.target.ring), "stacks", timeout_s=ANSWER_S, seconds=self._seconds,
            hz=self._rate_hz,
        )  # fmt: skip
        try:
            with closing(answers):
                for answer in answers:
                    self._raws += raw_stacks(answer)
                    if self._finished.is_set():
                        return
        except StagescopeError as problem:
            self._problem = problem

    def poll(self) -> Sequence[RawStack] | None:
        """Give what was seen once it is over (`Window`)."""
        if self._thread.is_alive():
            return None
        if self._problem is not None and not self._raws:
            raise self._problem
        return self._raws

    def finish(self) -> None:
        """Let it end with the next answer (`Window`)."""
        self._finished.set()

    def close(self) -> None:
        """End the conversation: it answers twice a second (`Window`)."""
        self._finished.set()
        self._thread.join(ANSWER_S + 1.0)


def raw_stacks(answer: Mapping[str, Any]) -> Iterator[RawStack]:
    """Read one answer of the ops `stacks` and `dump`."""
    frames = [Frame(*frame) for frame in answer["frames"]]
    stacks = [tuple([frames[place] for place in places]) for places in answer["stacks"]]
    for ident, stack, start_ns, end_ns, samples in answer["spans"]:
        native, name = answer["threads"].get(str(ident), (0, ""))
        yield RawStack(native, name, start_ns, end_ns, samples, stacks[stack])
