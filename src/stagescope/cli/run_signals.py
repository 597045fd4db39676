"""Signals of `stagescope run`: taken one by one, with who sent them, instead of handled."""

from __future__ import annotations

import signal

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
    """From now on keep signals for `next_signal`; gives the mask that children must restore.

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
    """Tell whether the terminal sent it: then the server, in the same group, has got it too."""
    return found.si_code == _SI_KERNEL
