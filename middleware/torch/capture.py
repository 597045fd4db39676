"""`capture`: records, in a served process, what torch and its device do in the next few batches.

    armed ─▶ warming ─▶ recording ─▶ stopping ─▶ exported
      └───────┴────────────┴────────────┴──────▶ failed; before all of them: refused

Armed, it waits for traffic, with no profiler on. Warming is a recording of operators alone that is
thrown away: it pays for the first start in a process, and tells how many events a batch makes,
which is what bounds the recording, for to stop one holds every thread of the process for some
microseconds an event. On a device the first batch recorded is left out too: kernels at the head
of a session get lost (pytorch#192021).
The asker's connection carries it all: it is told each state; a line of its says "enough, export";
when it closes, the profiler is stopped and nothing stays. docs/capture.md tells the user's side.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Lock
from typing import Any, NamedTuple

from stagescope.kernels import CaptureRequest
from stagescope.middleware.probe.server import Connection, Refused
from stagescope.middleware.recording import recorder as recorders
from stagescope.middleware.runtime.observers import leave, observe
from stagescope.middleware.runtime.pauses import write_stall
from stagescope.middleware.torch.ledger import Gate, Ledger
from stagescope.middleware.torch.profiler import (
    BYTES_AN_EVENT,
    Folder,
    Session,
    Unfit,
    folder_of,
    graph_under_way,
    holder,
    loaded_torch,
    on_device,
    read_request,
)

MIN_GAP_S = 60.0
"""From the end of one capture that a person asked for to the next: see `CaptureRequest.force`."""
PAUSE_S = 0.005
"""How often it is looked whether enough was recorded."""
BEAT_S = 0.5
"""How often the client is sent the state."""
SIZING_S = 0.3
"""How long the call that warming records may take of it, and how long a gate waits for one."""
STOPPING_S = 60.0
"""What stopping and writing may take beyond what was asked for; see `Profiled`."""
COLLECT_EVERY = 20
"""Captures after which the collector runs: each leaves about 0.3 MB (pytorch#193348), and to
collect at once would hold all threads far longer (230 ms seen) than the capture itself does."""

_turn = Lock()
_ended_ns = 0
_done = 0
_learnt: dict[bool, float] = {}
"""Events that a batch made in the last recording, shallow and deep."""


def _fresh_in_child() -> None:
    """A thread that the fork did not take along may have held the parent's."""
    global _turn
    _turn = Lock()


os.register_at_fork(after_in_child=_fresh_in_child)


class Left(Exception):
    """The asker has gone."""


class Enough(Exception):
    """The asker wants what there is."""


def answer(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Run one capture; give its outcome: `state`, and `why` where it is not `exported`."""
    asked = read_request(question)
    try:
        torch = loaded_torch()
        device = on_device(torch)
        if asked.device_only and not device:
            raise Unfit(f"process {os.getpid()} works on no CUDA device")
        with _alone(asked):
            if other := holder(torch, device=device):
                raise Refused(f"process {os.getpid()} is being profiled by {other}")
            return _run(asked, asker, torch, device=device)
    except Refused as why:
        return {"state": "refused", "why": str(why)}
    except Unfit as why:
        return {"state": "failed", "why": str(why)}
    except Left:
        return {"state": "failed", "why": "the asker has gone"}
    except Enough:
        return {"state": "failed", "why": "it was ended before anything was recorded"}
    except OSError as problem:
        where = problem.filename or asker.recorder.path
        return {"state": "failed", "why": f"{where} cannot be written: {problem.strerror}"}
    except (RuntimeError, AssertionError) as problem:  # torch's own
        first_line = str(problem).partition("\n")[0]
        return {"state": "failed", "why": f"torch's profiler failed: {first_line}"}


@contextmanager
def _alone(asked: CaptureRequest) -> Iterator[None]:
    """Have the process's one turn. Raises Refused where it is taken, or was just now."""
    global _ended_ns
    pid = os.getpid()
    turn = _turn
    if not turn.acquire(blocking=False):
        raise Refused(f"another capture of process {pid} is under way")
    try:
        left_s = MIN_GAP_S - (time.monotonic_ns() - _ended_ns) / 1e9
        if _ended_ns and left_s > 0 and not asked.force and not asked.background:
            raise Refused(
                f"process {pid} was captured a moment ago; wait {left_s:.0f} s more, or use --force"
            )
        yield
        if not asked.background:
            _ended_ns = time.monotonic_ns()
    finally:
        turn.release()


def _run(
    asked: CaptureRequest, asker: Connection, torch: Any, *, device: bool
) -> Mapping[str, Any]:
    spool = asker.recorder.path
    if spool is None:
        raise Refused("this process has no recorder file")
    ledger = Ledger(asker.recorder.clock)
    if device:
        graph_under_way(torch)  # from here on they are counted
        ledger.may_hold = lambda: not graph_under_way(torch)
    observe(ledger)
    try:
        with folder_of(spool.parent, asked) as folder:
            capture = Capture(asked, asker, torch, ledger, folder, device=device)
            outcome = capture.run()
            if outcome["state"] != "exported":
                folder.remove()
            return outcome
    finally:
        leave(ledger)
        if ledger.gate:
            ledger.gate.open()


class Profiled:
    """The stretch in which a profiler is at work, for whoever reads the process's requests.

    Written when it begins, with the latest end that it may have, and again at its end.
    """

    def __init__(self, clock: Callable[[], int], most_s: float) -> None:
        self.start_ns = clock()
        self._clock = clock
        self._write(self.start_ns + int(most_s * 1e9))

    def end(self) -> int:
        """Say that it has ended; returns when."""
        end_ns = self._clock()
        self._write(end_ns)
        return end_ns

    def _write(self, end_ns: int) -> None:
        for recorder in list(recorders.live):
            write_stall(recorder, b"capture", self.start_ns, end_ns)


class Window(NamedTuple):
    """What of a recording counts."""

    since_ns: int
    until_ns: int
    calls: int
    ended_by: str
    """`batches`, `events`, `seconds`, or `asked`."""


class Capture:
    """One capture, from `armed` on."""

    def __init__(
        self,
        asked: CaptureRequest,
        asker: Connection,
        torch: Any,
        ledger: Ledger,
        folder: Folder,
        *,
        device: bool,
    ) -> None:
        self._asked = asked
        self._asker = asker
        self._torch = torch
        self._ledger = ledger
        self._folder = folder
        self._device = device
        self._cpu = asked.deep or not device
        self._clock = asker.recorder.clock
        self._state = ""
        self._events_per_call = self._events_per_closing = self._events_per_s = 0.0

    def run(self) -> Mapping[str, Any]:
        """Go through the states. Raises Left, Enough, OSError, RuntimeError."""
        seconds = self._asked.seconds
        self._tell("armed")
        if not self._wait(self._ledger.begun.is_set, seconds, pause_s=0.05):
            return {
                "state": "failed",
                "why": f"no batch came within {seconds:g} s: send it requests "
                "(`stagescope load URL`), and mark the model's call as the stage `inference` "
                "where no hook does",
            }
        profiled = Profiled(self._clock, 2 * seconds + STOPPING_S)
        try:
            self._warm()
            return self._record(profiled)
        finally:
            _tidy()
            profiled.end()

    def _warm(self) -> None:
        """Record one batch's operators, and learn from them how many events a batch makes."""
        self._tell("warming")
        session = Session(self._torch, cpu=True, device=False)
        ledger = self._ledger
        with _running(session):
            session.prepare()
            self._start_between_calls(session)
            calls, closings, since_ns = ledger.calls, ledger.closings, self._clock()
            # Unbounded by events while it lasts, so short once a call has begun.
            self._wait(lambda: ledger.busy or ledger.calls > calls, self._asked.seconds)
            self._wait(lambda: ledger.calls > calls, SIZING_S)
            took_s = (self._clock() - since_ns) / 1e9
            calls, closings = ledger.calls - calls, ledger.closings - closings
            session.stop()
        # A device's work is a launch and a kernel for about each operator.
        events = session.events() * (1 if not self._device else 3 if self._cpu else 2)
        known = _learnt.get(self._cpu, 0.0)
        self._events_per_call = max(events / calls if calls else 0.0, known)
        self._events_per_closing = events / closings if closings else 0.0
        self._events_per_s = events / took_s

    def _record(self, profiled: Profiled) -> Mapping[str, Any]:
        """Record what was asked for, stop, and write it down."""
        anchors = [self._anchor()]
        session = Session(self._torch, cpu=self._cpu, device=self._device)
        with _running(session):
            session.prepare()
            self._start_between_calls(session)
            self._tell("recording")
            window = self._until_enough()
            leave(self._ledger)
            self._tell("stopping")
            stop_ns = self._clock()
            session.stop()
        stopped_ns = self._clock()
        self._check(session, window)
        session.save(self._folder.part)
        saved_ns = self._clock()
        size = self._folder.part.stat().st_size
        if window.calls:
            _learnt[self._cpu] = size / BYTES_AN_EVENT / (window.calls + self._device)
        facts = self._facts(window) | {
            "profiled_since_ns": profiled.start_ns,
            "profiled_until_ns": saved_ns,
            "stop_s": (stopped_ns - stop_ns) / 1e9,
            "save_s": (saved_ns - stopped_ns) / 1e9,
        }
        anchors.append(self._anchor())
        self._folder.finish(facts | {"anchors": anchors} | self._ledger.to_json())
        return facts | {"state": "exported", "bytes": size}

    def _check(self, session: Session, window: Window) -> None:
        """Raise where what was recorded is of no use, or nobody waits for it any more."""
        if session.taken:
            raise Unfit("the server started a torch profiler of its own meanwhile; try again later")
        if not window.calls and window.ended_by == "asked":
            raise Enough
        if self._asker.closed():
            raise Left

    def _facts(self, window: Window) -> dict[str, Any]:
        return {
            "capture_id": self._asked.capture_id,
            "pid": os.getpid(),
            "torch": str(self._torch.__version__),
            "device": self._device,
            "operators": self._cpu,
            "since_ns": window.since_ns,
            "until_ns": window.until_ns,
            "batches": window.calls,
            "ended_by": window.ended_by,
        }

    def _until_enough(self) -> Window:
        """Wait until there are enough batches, events or seconds, or the asker says so."""
        ledger, asked = self._ledger, self._asked
        since_ns, calls, closings = self._clock(), ledger.calls, ledger.closings
        reached = ""

        def enough() -> bool:
            nonlocal reached
            if ledger.calls - calls >= asked.batches:
                reached = "batches"
            elif self._estimate(
                ledger.calls - calls, ledger.closings - closings, self._clock() - since_ns
            ) >= asked.max_events:  # fmt: skip
                reached = "events"
            return bool(reached)

        try:
            if self._device and self._wait(lambda: ledger.calls > calls, asked.seconds):
                since_ns, calls, closings = self._clock(), ledger.calls, ledger.closings
            if not self._wait(enough, asked.seconds):
                reached = "seconds"
        except Enough:
            reached = "asked"
        return Window(since_ns, self._clock(), ledger.calls - calls, reached)

    def _start_between_calls(self, session: Session) -> None:
        """Switch the profiler on while the thread of the model stands between two calls."""
        gate = self._ledger.gate = Gate()
        try:
            self._wait(lambda: gate.reached.is_set() or not self._ledger.busy, SIZING_S)
            if self._device and graph_under_way(self._torch):
                raise Unfit("a CUDA graph is being captured; ask again when the model is ready")
            session.start()
        finally:
            self._ledger.gate = None
            gate.open()

    def _estimate(self, calls: int, closings: int, elapsed_ns: int) -> float:
        """Estimate the events so far: by what was counted meanwhile, else by time."""
        if self._events_per_closing:
            by_stage = closings * self._events_per_closing
            return max(by_stage, calls * self._events_per_call)
        return elapsed_ns / 1e9 * self._events_per_s

    def _wait(self, met: Callable[[], bool], most_s: float, *, pause_s: float = PAUSE_S) -> bool:
        """Wait until *met*, for *most_s* at most; True where it is. Raises Left and Enough."""
        since = beat = time.monotonic()
        while not met():
            now = time.monotonic()
            if now - since >= most_s:
                return False
            if now - beat >= BEAT_S:
                beat = now
                self._tell(self._state)
            if self._asker.closed(pause_s):
                raise Left
            if self._asker.has_input():
                raise Enough
        return True

    def _tell(self, state: str, **more: Any) -> None:
        self._state = state
        try:
            self._asker.send(
                {"state": state, "at_ns": self._clock(), "calls": self._ledger.calls, **more}
            )
        except OSError:
            raise Left from None

    def _anchor(self) -> tuple[int, int]:
        return self._clock(), time.time_ns()


@contextmanager
def _running(session: Session) -> Iterator[None]:
    """See to it that no profiler stays on, whatever happens inside."""
    try:
        yield
    finally:
        session.stop()


def _tidy() -> None:
    global _done
    _done += 1
    if _done % COLLECT_EVERY == 0:
        gc.collect()
