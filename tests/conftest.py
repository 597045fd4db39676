"""No test leaves a thread or a process behind: what is left is named, ended, and fails the test."""

import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TypeVar

import psutil
import pytest
from hypothesis import settings

from stagescope.middleware.probe.server import THREAD_NAME as PROBE_THREAD
from stagescope.middleware.recording.timeline import current

# No test is timed. CI tries the same examples each time; at the desk each run tries new ones.
settings.register_profile("ours", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("ours")

SETTLE_S = 5.0
"""How long what a test has stopped may take to be gone."""

MARK = "STAGESCOPE_TEST_SESSION"
"""An environment variable that every program started by this session inherits.

By it those are found whose parent died first: they are nobody's children any more.
"""

ROOT = Path(__file__).resolve().parent.parent

Found = TypeVar("Found")


@pytest.fixture(scope="session", autouse=True)
def _session_mark() -> Iterator[str]:
    """Mark whatever this session starts as its own."""
    os.environ[MARK] = mark = uuid.uuid4().hex
    # A helper process for each app of each test takes minutes; its own tests ask for it.
    os.environ["STAGESCOPE_AGENT"] = "thread"
    # A fresh clone runs its tests without an install: the programs that they start do, too.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        filter(None, (str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH")))
    )
    yield mark
    del os.environ[MARK], os.environ["STAGESCOPE_AGENT"]


@pytest.fixture(autouse=True)
def _nothing_left_behind(_session_mark: str) -> Iterator[None]:
    """Fail a test that leaves a thread or a process behind, a child's child included."""
    threads = set(threading.enumerate())
    pids = set(psutil.pids())
    yield
    left_threads = _settle(lambda: _new_threads(threads))
    left_processes = _settle(lambda: _new_processes(pids, _session_mark))
    told = [f"thread {thread.name!r} ({type(thread).__name__})" for thread in left_threads]
    told += [_told(process) for process in left_processes]
    for process in left_processes:
        _end(process)
    assert not told, f"left behind by the test: {'; '.join(told)}"
    inherited = current.get()
    current.set(None)
    assert inherited is None, "the test left its request current in this context"


def _settle(look: Callable[[], Sequence[Found]]) -> Sequence[Found]:
    """Return what *look* finds once it finds nothing, or what it still finds at the deadline."""
    deadline = time.monotonic() + SETTLE_S
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return found


def _new_threads(before: set[threading.Thread]) -> list[threading.Thread]:
    # A C library's own thread that once called into Python is listed for ever, ended or not.
    return [
        thread
        for thread in threading.enumerate()
        if thread not in before
        and not isinstance(thread, threading._DummyThread)
        and thread.name != PROBE_THREAD  # as long as the process; its own tests look for it
    ]


def _new_processes(before: set[int], mark: str) -> list[psutil.Process]:
    found = []
    for pid in set(psutil.pids()) - before:
        try:
            process = psutil.Process(pid)
            if _is_ours(process, mark) and not _belongs_to_python(process):
                found.append(process)
        except (psutil.Error, ProcessLookupError):  # gone meanwhile, or another user's
            continue
    return found


def _is_ours(process: psutil.Process, mark: str) -> bool:
    if process.ppid() == os.getpid():
        return True
    if process.status() == psutil.STATUS_ZOMBIE:
        return False  # ended; its parent, or init, has to notice
    # A forked copy of us shows the environment that we began with, but also our command line.
    me = psutil.Process()
    copied = os.getpgid(process.pid) == os.getpgid(0) and process.cmdline() == me.cmdline()
    return copied or process.environ().get(MARK) == mark


def _belongs_to_python(process: psutil.Process) -> bool:
    # multiprocessing starts one tracker for an interpreter, at its first use, and ends it at exit.
    return bool(process.pid == resource_tracker._resource_tracker._pid)  # type: ignore[attr-defined]


def _told(process: psutil.Process) -> str:
    try:
        state = "ended but not waited for" if process.status() == "zombie" else "running"
        return f"process {process.pid}, {state}: {' '.join(process.cmdline()) or process.name()}"
    except psutil.Error:
        return f"process {process.pid}, gone since"


def _end(process: psutil.Process) -> None:
    try:
        process.kill()
        process.wait(timeout=SETTLE_S)
    except (psutil.Error, ChildProcessError) as error:
        print(f"process {process.pid} could not be ended: {error}", file=sys.stderr)
