"""The processes below `stagescope run`: waited for, and none left behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Callable, Collection, Sequence

import psutil

from stagescope.errors import StagescopeError

FORWARDED = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
    signal.SIGTTIN,  # gunicorn: a worker more
    signal.SIGTTOU,  # and one less
)
TO_END = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
_ALL = (*FORWARDED, signal.SIGCHLD)

_SI_KERNEL = 0x80  # include/uapi/asm-generic/siginfo.h


def hold_back() -> set[signal.Signals]:
    """From now on keep signals for `next_signal`; returns the mask that children must restore.

    For good: a signal let through at the end would change the exit code.
    """
    # Ignored children are not waited for; a parent may have left us that.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ALL)
    return {signal.Signals(number) for number in before}


def next_signal(timeout_s: float) -> signal.struct_siginfo | None:
    """Wait for the next signal; None after *timeout_s*."""
    return signal.sigtimedwait(_ALL, max(0.0, timeout_s))


def drop_pending() -> None:
    """Forget what has come by now."""
    while next_signal(0) is not None:
        pass


def reached_the_group(found: signal.struct_siginfo) -> bool:
    """Return whether the terminal sent it: then the server, in the same group, has got it too."""
    return found.si_code == _SI_KERNEL


SETTLE_S = 1.0
"""What processes get to end by themselves, as a resource tracker does."""
KILLED_S = 5.0
"""How long SIGKILL may take."""
LOOK_S = 0.05


def reap(kept: Collection[int]) -> None:
    """Reap orphans that this process adopted and that have ended; those in *kept* are polled elsewhere."""
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return
        if ended is None or ended.si_pid in kept:
            return
        os.waitpid(ended.si_pid, 0)


def descendants(kept: Collection[int]) -> list[psutil.Process]:
    """Return every running process below us, but for those with a pid in *kept* and below them."""
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
    """End every process below us but *kept*: SIGTERM, *grace_s*, SIGKILL; returns what was ended."""
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
    """Wait until *done*; False after *timeout_s*, or at Ctrl-C from the terminal.

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


# include/uapi/linux/prctl.h
_SET_PDEATHSIG = 1
_SET_CHILD_SUBREAPER = 36


def adopt_orphans() -> None:
    """Make this process the parent of every descendant whose parent ends.

    Raises StagescopeError where this is not Linux.
    """
    if sys.platform != "linux":
        raise StagescopeError(
            "it needs Linux, to find what a server leaves behind; elsewhere add "
            "StageMiddleware to the app and start `stagescope agent`"
        )
    if _prctl(_SET_CHILD_SUBREAPER, 1) != 0:
        raise StagescopeError("this kernel lets no process adopt orphans (Linux 3.4 or newer does)")


def before_exec(mask: set[signal.Signals]) -> Callable[[], None]:
    """Return what a child calls between fork and exec: our signal mask is not for it.

    The child gets SIGTERM if this process dies, so that `kill -9` of us leaves no server.
    """
    prctl, parent = _prctl, os.getpid()

    def prepare() -> None:
        prctl(_SET_PDEATHSIG, signal.SIGTERM)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if os.getppid() != parent:
            os._exit(128 + signal.SIGTERM)  # We died before the kernel knew what to do then.

    return prepare


def _prctl(option: int, value: int) -> int:
    return int(_libc.prctl(option, value, 0, 0, 0))


_libc = ctypes.CDLL(None, use_errno=True)
