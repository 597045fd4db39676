"""The stacks of one process at one moment: by its probe, or by py-spy where that does not answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stagescope.agent.in_process_stacks import InProcess
from stagescope.agent.py_spy import PySpy, find_py_spy
from stagescope.agent.reading_rights import why_not
from stagescope.agent.stack_samplers import StackSampler, Target
from stagescope.agent.stage_labels import RawStack, StageLabels
from stagescope.errors import StagescopeError
from stagescope.stacks import StackSpan

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
        """Give the stacks of *target* now, the thread of an event loop first.

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
    """Tell whether a thread runs an event loop: asyncio's, or uvloop's by asyncio's runner."""
    return any(
        function.rpartition(".")[2] in LOOPS or file.endswith("asyncio/runners.py")
        for function, file, _ in frames
    )


LOOPS = ("run_forever", "_run_once", "run_until_complete")


def _is_no_loop(raw: RawStack) -> bool:
    return not runs_a_loop(raw.frames)
