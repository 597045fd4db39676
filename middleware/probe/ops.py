"""The probe's `hello`: who this process is, and what can be asked of it."""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any

from stagescope.middleware.probe.server import OPS, Connection, Refused
from stagescope.middleware.probe.stacks import StackRecorder


def hello(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Return pid, Python, threads, the ops, torch's version, and whether it uses a device."""
    torch = sys.modules.get("torch")
    from stagescope.middleware.torch.memory import state

    return {
        "pid": os.getpid(),
        "python": platform.python_version(),
        "threads": threading.active_count(),
        "ops": sorted(OPS),
        "torch": getattr(torch, "__version__", "") if torch else "",
        "device": state(torch),
    }


def dump(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Look once."""
    stacks = StackRecorder(0)
    stacks.add(time.monotonic_ns())
    return stacks.answer()


# The probe's `allow_ptrace`: lets one process read this one's memory, where Yama asks for leave.
#
#     {"op": "allow_ptrace", "pid": 4711}
#
# `prctl(PR_SET_PTRACER, pid)`, prctl(2): with `kernel.yama.ptrace_scope` 1 a process may be read by
# its own ancestors, and by the one that it names itself and what that one starts. Only who asks is
# named, as the kernel knows him: `pid` could be anybody, or (-1) PR_SET_PTRACER_ANY.


PR_SET_PTRACER = 0x59616D61


def allow_ptrace(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Name the process that asks; the socket is its owner's alone, so it is of the same user."""
    pid = asker.peer_pid()
    if pid <= 0 or question.get("pid") != pid:
        raise Refused("`pid` is the process that may read this one: the one that asks")
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0):
        why = os.strerror(ctypes.get_errno())
        raise Refused(f"the system refuses to name process {pid} as one that may read it: {why}")
    return {"allowed": pid}
