"""The probe's `allow_ptrace`: lets one process read this one's memory, where Yama asks for leave.

    {"op": "allow_ptrace", "pid": 4711}

`prctl(PR_SET_PTRACER, pid)`, prctl(2): with `kernel.yama.ptrace_scope` 1 a process may be read by
its own ancestors, and by the one that it names itself and what that one starts.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from typing import Any

from stagescope.middleware.probe import Refused, Talk

PR_SET_PTRACER = 0x59616D61


def answer(question: Mapping[str, Any], talk: Talk) -> Mapping[str, Any]:
    """Name the process `pid`; the socket is its owner's alone, so the asker is of the same user."""
    pid = question.get("pid")
    if not isinstance(pid, int) or pid <= 0:
        raise Refused("`pid` is the process that may read this one")
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    if prctl(PR_SET_PTRACER, ctypes.c_ulong(pid), 0, 0, 0):
        why = os.strerror(ctypes.get_errno())
        raise Refused(f"the system refuses to name process {pid} as one that may read it: {why}")
    return {"allowed": pid}
