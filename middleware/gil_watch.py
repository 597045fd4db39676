"""How long a thread waits for the interpreter's lock: an estimate, made only where asked for.

A thread sleeps for a millisecond, ten times a second; by how much longer it took than the least
that it ever took here (which is the timer's own lateness) is taken as the wait for the lock. On a
machine whose cores are all busy the wait for a core is in it as well. Each reading makes the
thread that holds the lock give it up once.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any, Protocol
from weakref import WeakSet

VARIABLE = "STAGESCOPE_GIL"
"""Set to 1 it starts the thread."""
PERIOD_S = 0.1
NAP_S = 0.001

_watched: WeakSet[Any] = WeakSet()


class Figures(Protocol):
    """A recorder, as far as these figures go."""

    @property
    def closed(self) -> bool:
        """True once nothing more is to be written."""
        ...

    def add_wait(self, name: str, value: int) -> None:
        """Add *value* to a figure."""

    def raise_wait(self, name: str, value: int) -> None:
        """Make a figure *value* if it is less."""


def watch_gil(recorder: Figures) -> None:
    """Start the thread where `STAGESCOPE_GIL` asks for it, once a recorder."""
    if os.environ.get(VARIABLE, "") in ("", "0") or recorder in _watched:
        return
    _watched.add(recorder)
    watch = GilWatch(recorder)
    threading.Thread(target=watch.run, name="stagescope-gil", daemon=True).start()


class GilWatch:
    """Takes the readings."""

    def __init__(self, recorder: Figures) -> None:
        self._recorder = recorder
        self._least_ns = 1 << 62

    def run(self) -> None:
        """Take readings until the recorder is closed."""
        while not self._recorder.closed:
            time.sleep(PERIOD_S)
            try:
                self.read()
            except ValueError:
                return  # The file is a forked parent's, see Recorder.abandon.

    def read(self) -> None:
        """Take one reading."""
        used_ns = time.thread_time_ns()
        before_ns = time.perf_counter_ns()
        time.sleep(NAP_S)
        took_ns = time.perf_counter_ns() - before_ns
        self._least_ns = min(self._least_ns, took_ns)
        waited_ns = took_ns - self._least_ns
        recorder = self._recorder
        recorder.add_wait("gil_ticks", 1)
        recorder.add_wait("gil_wait_ns", waited_ns)
        recorder.raise_wait("gil_wait_max_ns", waited_ns)
        recorder.add_wait("gil_cost_ns", time.thread_time_ns() - used_ns)
