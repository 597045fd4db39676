"""The probe's `accelerator`: what torch tells of this process's devices, whoever made them.

It neither loads torch nor initialises a device: a process that has done neither has no devices.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from stagescope.middleware.probe import Talk

T = TypeVar("T")


def answer(question: Mapping[str, Any], talk: Talk) -> Mapping[str, Any]:
    """Give the devices: type, ordinal, and of name, UUID and memory (bytes) what torch knows."""
    torch = sys.modules.get("torch")
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6 and later
    if torch is None or accelerator is None or not accelerator.is_available():
        return {"devices": []}
    kind = accelerator.current_accelerator().type
    module = getattr(torch, kind, None)
    if not getattr(module, "is_initialized", lambda: True)():
        return {"devices": []}  # it may be about to fork, and initialised parents break children
    platform = "hip" if getattr(torch.version, "hip", None) else kind
    return {
        "devices": [
            {"type": kind, "platform": platform, "ordinal": index}
            | _memory(accelerator, index)
            | _identity(module, index)
            for index in range(accelerator.device_count())
        ]
    }


def _memory(accelerator: Any, index: int) -> dict[str, int]:
    told: dict[str, int] = {}
    stats = _known(lambda: accelerator.memory_stats(index)) or {}
    for name, key in (("allocated_bytes", "allocated_bytes"), ("reserved_bytes", "reserved_bytes")):
        if f"{key}.all.current" in stats:
            told[name] = stats[f"{key}.all.current"]
    if free_and_total := _known(lambda: accelerator.get_memory_info(index)):
        free, total = free_and_total
        told |= {"used_bytes": total - free, "total_bytes": total}
    return told


def _identity(module: Any, index: int) -> dict[str, str]:
    told = {}
    if name := _known(lambda: module.get_device_name(index)):
        told["name"] = str(name)
    if uuid := _known(lambda: module.get_device_properties(index).uuid):
        told["uuid"] = str(uuid)
    return told


def _known(ask: Callable[[], T]) -> T | None:
    """Ask a back end; those that lack it raise, each in its own way."""
    try:
        return ask()
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
