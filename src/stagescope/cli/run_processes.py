"""The processes below `stagescope run`: waited for, and none left behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Sequence

import psutil

from stagescope.cli.run_signals import TO_END, next_signal, reached_the_group

SETTLE_S = 1.0
"""What processes get to end by themselves, as a resource tracker does."""
KILLED_S = 5.0
"""How long SIGKILL may take."""
LOOK_S = 0.05


def reap(kept: Collection[int]) -> None:
    """Take note of ended orphans that came to us; those in *kept* are somebody else's to poll."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in kept:
            return
        os.waitpid(ended.si_pid, 0)


def descendants(kept: Collection[int]) -> list[psutil.Process]:
    """Give every running process below us, but for those with a pid in *kept* and below them."""
    found: list[psutil.Process] = []
    for child in psutil.Process().children():
        if child.pid not in kept:
            found += [child, *_below(child)]
    return [process for process in found if _runs(process)]


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return list(process.children(recursive=True))
    except psutil.Error:
        return []  # It has just ended; what was below it is our child now.


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_descendants(kept: Collection[int], grace_s: float) -> list[str]:
    """End every process below us but *kept*: SIGTERM, *grace_s*, SIGKILL; gives what was ended."""
    if _wait_gone(kept, SETTLE_S):
        return []
    left = descendants(kept)
    told = {process.pid: _told(process) for process in left}
    _send(left, signal.SIGTERM)
    if not _wait_gone(kept, grace_s):
        deadline = time.monotonic() + KILLED_S
        # Again and again: one that forks may have forked in between.
        while (left := descendants(kept)) and time.monotonic() < deadline:
            told |= {process.pid: f"{_told(process)}, by SIGKILL" for process in left}
            _send(left, signal.SIGKILL)
            _wait_gone(kept, LOOK_S)
    return list(told.values())


def _send(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        try:
            process.send_signal(number)
        except psutil.Error:
            continue  # gone meanwhile


def _wait_gone(kept: Collection[int], timeout_s: float) -> bool:
    def gone() -> bool:
        reap(kept)
        return not descendants(kept)

    return wait_for(gone, timeout_s)


def wait_for(done: Callable[[], bool], timeout_s: float) -> bool:
    """Wait until *done*; False after *timeout_s*, or when somebody at the terminal won't wait.

    Other signals change nothing: who ends a whole group signals us a moment after the server.
    """
    deadline = time.monotonic() + timeout_s
    while not done():
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        found = next_signal(min(left_s, LOOK_S))
        if found is not None and found.si_signo in TO_END and reached_the_group(found):
            return False
    return True


def _told(process: psutil.Process) -> str:
    try:
        return f"{process.name()} (pid {process.pid})"
    except psutil.Error:
        return f"pid {process.pid}"
