"""A process that was stopped as a whole (SIGSTOP, a debugger, a virtual machine that stood still).

While a load run lasts a thread sleeps for a moment, again and again. Where it wakes far too late,
and neither did the process compute meanwhile nor was a thread of it ready to, no thread of it ran
at all: that is written as a stall.
"""

from __future__ import annotations

import threading
import time
from weakref import WeakKeyDictionary

from stagescope.middleware.recording.guard import guarded
from stagescope.middleware.recording.recorder import Recorder
from stagescope.middleware.runtime.pauses import write_stall
from stagescope.middleware.runtime.thread_clock import ThreadClock, thread_clock

_now = time.monotonic_ns

PERIOD_NS = 20_000_000
FLOOR_NS = 100_000_000
"""Lateness from which it may have been stopped."""
SHARE = 0.7
"""Of the lateness, what nothing else explains where it was."""
QUIET_NS = 5_000_000_000
"""The thread ends when no request of a load run came for so long."""

_watches: WeakKeyDictionary[Recorder, StopWatch] = WeakKeyDictionary()


def keep_watching(recorder: Recorder, loop_clock: ThreadClock) -> None:
    """Watch for stops from now until no request has come for a while; *loop_clock* is its loop's."""
    watch = _watches.get(recorder)
    if watch is None or not watch.thread.is_alive():  # A fork does not take the thread along.
        watch = _watches[recorder] = StopWatch(recorder)
        watch.keep_on(loop_clock)
        watch.thread.start()
    watch.keep_on(loop_clock)


class StopWatch:
    """Watches one process; what it finds goes to its recorder."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._until_ns = 0
        self._loop_clock: ThreadClock | None = None
        self.thread = threading.Thread(target=self._run, name="stagescope-stops", daemon=True)

    def keep_on(self, loop_clock: ThreadClock) -> None:
        """Go on for a while from now."""
        self._until_ns = _now() + QUIET_NS
        self._loop_clock = loop_clock

    def _run(self) -> None:
        with guarded(self._recorder):
            while not self._recorder.closed and _now() < self._until_ns:
                begun_ns, explained_ns = _now(), self._explained_ns()
                time.sleep(PERIOD_NS / 1e9)
                due_ns = begun_ns + PERIOD_NS
                late_ns = _now() - due_ns
                if late_ns < FLOOR_NS:
                    continue
                stopped_ns = late_ns - (self._explained_ns() - explained_ns)
                if stopped_ns >= SHARE * late_ns and not self._recorder.closed:
                    write_stall(self._recorder, b"stopped", due_ns, due_ns + stopped_ns)

    def _explained_ns(self) -> int:
        """Return what the process computed, and this thread and the loop's waited for a core."""
        queued_ns = thread_clock().queued_ns()
        if self._loop_clock is not None:
            try:
                queued_ns += self._loop_clock.queued_ns()
            except ProcessLookupError:  # The loop's thread has ended.
                self._loop_clock = None
        return time.process_time_ns() + queued_ns
