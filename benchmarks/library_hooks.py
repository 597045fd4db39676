"""What a recognised call of a model library costs: the wrapper around a function that does nothing.

  python benchmarks/library_hooks.py

Every library's hook puts the same wrapper around its calls, so its cost is that of each. Told are
the call that is charged, one nested in it, one under a mark of the app's, and one outside requests;
medians and quartiles of rounds, beside the call of the bare function in the same round.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "src"))  # measures this checkout

from stagescope.middleware.hooks.model_calls import model_call, timed_call
from stagescope.middleware.stage import stage
from stagescope.testing.recording import Recording

ROUNDS, REQUESTS, CALLS = 60, 100, 5


def bare() -> None:
    """Do what a model would."""


def main() -> None:
    """Measure each kind of call and print a row."""
    timed = timed_call(bare)
    with tempfile.TemporaryDirectory() as folder, closing(Recording(Path(folder))) as recording:
        print(f"{'ns a call over bare':<28}{'median':>8}{'quartiles':>16}")
        for name, around in (
            ("charged", nullcontext),
            ("within another call", model_call),
            ("under a mark", lambda: stage("rerank")),
            ("outside requests", None),
        ):
            over: list[float] = []
            for _ in range(ROUNDS):
                over.append(_spent(recording, timed, around) - _spent(recording, bare, around))
                recording.read()
            low, middle, high = statistics.quantiles(over)
            print(f"{name:<28}{middle:8.0f}{low:8.0f}{high:8.0f}")


def _spent(
    recording: Recording, function: Callable[[], None], around: Callable[[], object] | None
) -> float:
    """Return the ns of one call, the mean of a block of requests."""
    spent = 0
    for _ in range(REQUESTS):
        with ExitStack() as entered:
            if around is not None:
                entered.enter_context(recording.request())
                entered.enter_context(around())  # type: ignore[arg-type]
            began = time.thread_time_ns()
            for _ in range(CALLS):
                function()
            spent += time.thread_time_ns() - began
    return spent / REQUESTS / CALLS


if __name__ == "__main__":
    main()
