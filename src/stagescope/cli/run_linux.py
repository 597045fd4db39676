"""What `stagescope run` asks of the Linux kernel: orphans come to us, children go when we go."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Callable

from stagescope.errors import StagescopeError

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
    """Give what a child calls between fork and exec: our signal mask is not for it.

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
