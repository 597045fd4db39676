"""The processes below `stagescope run`: waited for, and none left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

import psutil

from stagescope.cli.run_signals import TO_END, next_signal

SETTLE_S = 1.0
"""What processes get to end by themselves, as a resource tracker does."""
KILLED_S = 5.0
"""How long SIGKILL may take."""
LOOK_S = 0.05


def reap(ours: Sequence[subprocess.Popen[bytes]]) -> None:
    """Take note of ended children: of *ours*, and of orphans that came to us."""
    while True:
        for process in ours:
            process.poll()
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None:
            return
        if not any(ended.si_pid == process.pid for process in ours):
            os.waitpid(ended.si_pid, 0)


def descendants(kept: Sequence[subprocess.Popen[bytes]]) -> list[psutil.Process]:
    """Give every running process below us, but for *kept* and what is below those."""
    keep = {process.pid for process in kept}
    for process in kept:
        try:
            keep |= {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
        except psutil.Error:
            continue
    below = psutil.Process().children(recursive=True)
    return [process for process in below if process.pid not in keep and _runs(process)]


def _runs(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


def end_descendants(kept: Sequence[subprocess.Popen[bytes]], grace_s: float) -> list[str]:
    """End every process below us but *kept*: SIGTERM, *grace_s*, SIGKILL; gives what was ended."""
    if _wait_gone(kept, SETTLE_S):
        return []
    told = {process.pid: _told(process) for process in descendants(kept)}
    _send(descendants(kept), signal.SIGTERM)
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


def _wait_gone(kept: Sequence[subprocess.Popen[bytes]], timeout_s: float) -> bool:
    return wait_for(lambda: not descendants(kept), kept, timeout_s)


def wait_for(
    done: Callable[[], bool], ours: Sequence[subprocess.Popen[bytes]], timeout_s: float
) -> bool:
    """Wait until *done*; False after *timeout_s*, or when we are asked to end (once more)."""
    deadline = time.monotonic() + timeout_s
    while True:
        reap(ours)
        if done():
            return True
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            return False
        found = next_signal(min(left_s, LOOK_S))
        if found is not None and found.si_signo in TO_END:
            return False


def _told(process: psutil.Process) -> str:
    try:
        return f"{process.name()} (pid {process.pid})"
    except psutil.Error:
        return f"pid {process.pid}"
