"""The probe's `torch`: what torch holds on its devices, and the device time of stages so far.

The first question that finds a device in use also begins the taking of device times, and the
watch for running out of memory. torch is looked up among the loaded modules, never imported, and
a device that the server has not begun to use is not begun.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from stagescope.middleware.hooks.torch_device import device_time
from stagescope.middleware.hooks.torch_device_clock import in_use, possible
from stagescope.middleware.hooks.torch_memory import device_memory, pinned_memory
from stagescope.middleware.hooks.torch_snapshot import watch_memory
from stagescope.middleware.probe import Talk

NONE, WAITING, IN_USE = "none", "waiting", "in use"


def answer(question: Mapping[str, Any], talk: Talk) -> Mapping[str, Any]:
    """Give state and, where a device is in use, sums and levels; times are monotonic ns."""
    return readings(sys.modules.get("torch"), talk)


def state(torch: Any) -> str:
    """Tell whether *torch* uses a device, could still begin to, or has none to use."""
    if not hasattr(torch, "version"):
        return NONE  # Not loaded, or only half by now.
    if in_use(torch) is not None:
        return IN_USE
    return WAITING if possible(torch) else NONE


def readings(torch: Any, talk: Talk) -> Mapping[str, Any]:
    """Read *torch*."""
    now_ns = talk.recorder.clock()
    if (present := state(torch)) != IN_USE or (found := in_use(torch)) is None:
        return {"state": present, "at_ns": now_ns}
    kind, namespace = found
    times = device_time(kind, namespace)
    watch_memory(torch, kind, namespace, talk.recorder)
    return {
        "state": IN_USE,
        "at_ns": now_ns,
        "kind": kind,
        "times": times.sums() if times is not None else None,
        **_memory(kind, namespace),
    }


def _memory(kind: str, namespace: Any) -> Mapping[str, Any]:
    try:
        return {"memory": device_memory(kind, namespace), "pinned": pinned_memory(namespace)}
    except RuntimeError as refusal:  # An allocator that was plugged in tells nothing.
        return {"memory": [], "pinned": None, "why_no_memory": str(refusal).partition("\n")[0]}
