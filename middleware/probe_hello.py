"""The probe's `hello`: who this process is, and what can be asked of it."""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Mapping
from typing import Any

from stagescope.middleware.probe import OPS, Talk


def answer(question: Mapping[str, Any], talk: Talk) -> Mapping[str, Any]:
    """Give pid, Python, threads, the ops, torch's version, and whether it uses a device."""
    torch = sys.modules.get("torch")
    from stagescope.middleware.hooks.torch_readings import state

    return {
        "pid": os.getpid(),
        "python": platform.python_version(),
        "threads": threading.active_count(),
        "ops": sorted(OPS),
        "torch": getattr(torch, "__version__", "") if torch else "",
        "device": state(torch),
    }
