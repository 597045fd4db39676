"""py-spy as a stack sampler: from outside, without pausing the server.

Always `--nonblocking`: its default stops every thread at each sample, which took 8 to 37 % of a
server's throughput where we measured. `--idle`, because its Chrome trace is of changes only and
leaves a thread's last stack open while that is idle. No `-F`: the blocks of stages are recognised by
the line that runs, and not by the first one of its function.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import IO, Any

from stagescope.agent.host.proc import cpu_s
from stagescope.agent.stacks.in_process import Target
from stagescope.agent.stacks.labels import RawStack
from stagescope.agent.stacks.thread_cpu import A_THREAD_NS, READ_EVERY_NS
from stagescope.errors import StagescopeError
from stagescope.stacks import Frame, ThreadCpu, read_thread_cpu

# What py-spy writes, read: its Chrome trace, its dump, and its errors.
#
# Chrome trace (py-spy 0.4, `src/chrometrace.rs`): `B` and `E` events, one where a thread's stack
# changes, `ts` in µs since it began, `tid` Python's ident of the thread.


def read_trace(text: bytes, begun_ns: int, period_ns: int, threads: Threads) -> list[RawStack]:
    """Read a Chrome trace that was begun at *begun_ns*. Raises ValueError where it is none."""
    events = json.loads(text) if text.strip() else []
    by_thread: dict[int, list[Mapping[str, Any]]] = {}
    for event in events:
        if event.get("ph") in ("B", "E"):
            by_thread.setdefault(int(event["tid"]), []).append(event)
    return [
        RawStack(*threads.get(ident, (0, "")), begun_ns + since, begun_ns + until,
                 max(1, round((until - since) / period_ns)), frames)
        for ident, of_thread in by_thread.items()
        for since, until, frames in _stretches(of_thread)
    ]  # fmt: skip


Threads = Mapping[int, tuple[int, str]]
"""Python's ident of a thread → the system's id, and its name."""


def _stretches(events: list[Mapping[str, Any]]) -> Iterator[tuple[int, int, tuple[Frame, ...]]]:
    """Yield (from, until, frames) of one thread's *events*; times in ns."""
    frames: list[Frame] = []
    since = 0
    for at, changes in groupby(events, key=lambda event: int(event["ts"]) * 1000):
        if frames and at > since:
            yield since, at, tuple(frames)
        for change in changes:
            if change["ph"] == "B":
                where = change.get("args", {})
                name, file = str(change["name"]), str(where.get("filename", ""))
                frames.append(Frame(name, file, int(where.get("line") or 0)))
            elif frames:
                frames.pop()
        since = at


def read_dump(text: bytes, at_ns: int) -> list[RawStack]:
    """Read `py-spy dump --json`, taken at *at_ns*. Raises ValueError where it is none."""
    return [
        RawStack(
            int(thread.get("os_thread_id") or 0),
            str(thread.get("thread_name") or ""),
            at_ns,
            at_ns,
            1,
            tuple(
                Frame(str(f["name"]), str(f["filename"]), int(f.get("line") or 0))
                for f in reversed(thread["frames"])
            ),
        )
        for thread in json.loads(text)
    ]


def read_threads(text: bytes) -> Threads:
    """Read from a dump which threads there are; none where it failed."""
    try:
        return {
            int(t["thread_id"]): (int(t.get("os_thread_id") or 0), str(t.get("thread_name") or ""))
            for t in json.loads(text)
        }
    except (ValueError, KeyError):
        return {}


_CAUSES = (
    ("no space left", "there is no room left in {folder}"),
    ("permission", "the system does not let this user read process {pid}"),
    ("operation not permitted", "the system does not let this user read process {pid}"),
    ("find python version", "process {pid} is no Python that py-spy knows"),
    ("find a python interpreter", "process {pid} is no Python that py-spy knows"),
    ("no such process", "process {pid} has ended"),
    ("check that the process is running", "process {pid} has ended"),
)


def why_failed(stderr: str, pid: int, folder: Path) -> str:
    """Return, in one sentence, why py-spy gave nothing of process *pid*."""
    text = stderr.lower()
    for sign, cause in _CAUSES:
        if sign in text:
            return f"py-spy sampled nothing: {cause.format(pid=pid, folder=folder)}"
    lines = [line for line in stderr.splitlines() if line.startswith("Error")] or [stderr[:200]]
    return f"py-spy sampled nothing of process {pid}: {lines[0].strip() or 'no reason given'}"


RATE_HZ = 49
"""Not 50: not in step with what a server does at round times."""
PATIENCE_S = 5.0
"""What it gets beyond its window to start and to write; then it hangs, and is killed."""
START_NS = 6_000_000
"""From our starting it to the zero of its times: marks laid over requests say 6 to 8 ms, the research
before said 1 to 6, once in a while 14."""
ERROR_NS = 10_000_000
"""How far its times may be off for that."""


@cache
def _leash() -> tuple[str, ...]:
    """Return the words that make a program end with the agent, also where that is killed.

    util-linux has them (prctl(2), PR_SET_PDEATHSIG); where it is not, a window ends by its length.
    """
    setpriv = shutil.which("setpriv")
    words = (setpriv, "--pdeathsig", "KILL", "--") if setpriv else ()
    tried = subprocess.run([*words, "true"], check=False, capture_output=True) if words else None
    return words if tried is not None and tried.returncode == 0 else ()


def find_py_spy(environment: Mapping[str, str] = os.environ) -> Path | None:
    """Find the program: beside this interpreter, else on the search path."""
    places = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    found = shutil.which("py-spy", path=places)
    return Path(found) if found else None


class PySpy:
    """Samples with the program *py_spy*, by way of files in *folder*, which is private."""

    how = "py-spy"
    error_ns = ERROR_NS

    def __init__(
        self, py_spy: Path, folder: Path, clock: Callable[[], int] = time.monotonic_ns
    ) -> None:
        self._py_spy = py_spy
        self._folder = folder
        self._clock = clock
        self._begun = 0

    def begin(self, target: Target, seconds: float, pace: float = 1.0) -> PySpyWindow:
        """Start it on *target*. Raises StagescopeError where it cannot be started."""
        self._begun += 1
        stem = self._folder / f"window-{self._begun}"
        rate_hz = max(1, round(RATE_HZ * pace))
        return PySpyWindow(self._py_spy, target, seconds, rate_hz, stem, self._clock)

    def dump(self, target: Target, timeout_s: float) -> list[RawStack]:
        """Return the stacks of this moment. Raises StagescopeError."""
        return dump(self._py_spy, target.pid, timeout_s, self._clock())


def dump(py_spy: Path, pid: int, timeout_s: float, at_ns: int = 0) -> list[RawStack]:
    """Return the stacks of process *pid* now, at *at_ns*. Raises StagescopeError."""
    done = run_once(dump_words(py_spy, pid), timeout_s)
    try:
        return read_dump(done.stdout, at_ns)
    except ValueError:
        stderr = done.stderr.decode("utf-8", "replace")
        raise StagescopeError(why_failed(stderr, pid, Path("/"))) from None


def run_once(words: Sequence[str], timeout_s: float) -> subprocess.CompletedProcess[bytes]:
    """Run py-spy to its end. Raises StagescopeError where it is not started, or takes longer."""
    try:
        return subprocess.run(
            words, check=False, capture_output=True, timeout=timeout_s,
            stdin=subprocess.DEVNULL, env=_environment(),
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise StagescopeError(f"py-spy gave nothing within {timeout_s:g} s") from None
    except OSError as problem:
        raise StagescopeError(f"py-spy cannot be started: {problem.strerror}") from None


class PySpyWindow:
    """One `py-spy record`, and a dump beside it, which knows the threads' names."""

    def __init__(
        self,
        py_spy: Path,
        target: Target,
        seconds: float,
        rate_hz: int,
        stem: Path,
        clock: Callable[[], int],
    ) -> None:
        self.target = target
        self._rate_hz = rate_hz
        self._clock = clock
        self._trace, self._names, self._errors = (
            stem.with_suffix(suffix) for suffix in (".trace", ".threads", ".errors")
        )
        self._deadline_ns = clock() + int((seconds + PATIENCE_S) * 1e9)
        self._processes: list[subprocess.Popen[bytes]] = []
        self._used_s: dict[int, float] = {}
        self.thread_cpu: list[ThreadCpu] = []
        self._read_again_ns = 0
        self._cut_short = False
        pid = target.pid
        try:
            with self._names.open("wb") as names, self._errors.open("wb") as errors:
                self._begun_ns = clock()
                self._read_thread_cpu(at_once=True)
                record = record_words(py_spy, pid, seconds, rate_hz, self._trace)
                self._record = self._start(record, subprocess.DEVNULL, errors)
                self._start(dump_words(py_spy, pid), names, subprocess.DEVNULL)
        except OSError as problem:
            self.close()
            raise StagescopeError(
                f"py-spy cannot be started: {problem.filename}: {problem.strerror}"
            ) from None

    def _start(
        self, words: Sequence[str], stdout: IO[bytes] | int, stderr: IO[bytes] | int
    ) -> subprocess.Popen[bytes]:
        # What cannot be started is to fail here, and not in the program that starts it.
        leash = _leash() if os.access(words[0], os.X_OK) else ()
        # A session of its own: Ctrl-C is the agent's to answer.
        process = subprocess.Popen(
            [*leash, *words], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, env=_environment(),
            start_new_session=True,
        )  # fmt: skip
        self._processes.append(process)
        return process

    @property
    def cpu_s(self) -> float:
        """CPU seconds of its processes (`Window`)."""
        return sum(self._used_s.values())

    def poll(self) -> list[RawStack] | None:
        """Return what was seen once it is over (`Window`)."""
        for process in self._processes:
            if process.returncode is None:  # its figures last until it is waited for
                self._used_s[process.pid] = cpu_s(process.pid)
        going_on = any(process.poll() is None for process in self._processes)
        self._read_thread_cpu(at_once=not going_on)
        if going_on:
            if self._cut_short:
                self.finish()  # again: a signal before it listens is lost where it is ignored
            if self._clock() < self._deadline_ns:
                return None
            self.close()
            raise StagescopeError(
                f"py-spy did not finish with process {self.target.pid} and was killed"
            )
        try:
            return self._read()
        finally:
            self.close()

    def _read_thread_cpu(self, *, at_once: bool) -> None:
        now_ns = self._clock()
        if at_once or now_ns >= self._read_again_ns:
            reading = read_thread_cpu(Path(f"/proc/{self.target.pid}"), now_ns)
            self.thread_cpu.append(reading)
            pause_ns = max(READ_EVERY_NS, A_THREAD_NS * len(reading.used_ns))
            self._read_again_ns = now_ns + pause_ns

    def _read(self) -> list[RawStack]:
        if self._record.returncode == -signal.SIGINT:
            return []  # `finish` came before it had begun
        try:
            if self._record.returncode:  # a target that ended meanwhile is none
                raise ValueError
            threads = read_threads(self._names.read_bytes())
            period_ns = 1_000_000_000 // self._rate_hz
            return read_trace(
                self._trace.read_bytes(), self._begun_ns + START_NS, period_ns, threads
            )
        except (OSError, ValueError, KeyError):
            told = self._errors.read_text("utf-8", "replace") if self._errors.exists() else ""
            raise StagescopeError(why_failed(told, self.target.pid, self._trace.parent)) from None

    def finish(self) -> None:
        """Make it write what it has (`Window`)."""
        self._cut_short = True
        if self._record.poll() is None:
            self._record.send_signal(signal.SIGINT)

    def close(self) -> None:
        """End its processes and remove its files (`Window`)."""
        for process in self._processes:
            if process.poll() is None:
                process.kill()
                process.wait()
        for file in (self._trace, self._names, self._errors):
            with suppress(OSError):
                file.unlink()


def record_words(py_spy: Path, pid: int, seconds: float, rate_hz: int, trace: Path) -> list[str]:
    """Return the command line of a window."""
    return [
        str(py_spy), "record", "-p", str(pid), "-f", "chrometrace", "--nonblocking", "--idle",
        "--full-filenames", "-r", str(rate_hz), "-d", str(max(1, round(seconds))), "-o", str(trace),
    ]  # fmt: skip


def dump_words(py_spy: Path, pid: int) -> list[str]:
    """Return the command line of a dump."""
    return [str(py_spy), "dump", "-p", str(pid), "--json", "--nonblocking"]


def _environment() -> dict[str, str]:
    return os.environ | {"RUST_BACKTRACE": "0"}
