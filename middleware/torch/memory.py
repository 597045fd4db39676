"""What torch's allocators say of themselves: device memory and pinned host memory.

Peaks are read and never reset, for others use them; counters only grow, and who asks takes their
difference. Keys are those of `torch.cuda.memory_stats` and `host_memory_stats`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from stagescope.middleware.probe.server import Connection
from stagescope.middleware.torch.device_events import device_name, in_use, possible
from stagescope.middleware.torch.device_time import device_time
from stagescope.middleware.torch.snapshot import watch_memory

LEVELS = {
    "allocated": "allocated_bytes",
    "active": "active_bytes",
    "reserved": "reserved_bytes",
    "inactive_split": "inactive_split_bytes",
    "requested": "requested_bytes",
}
"""Our word → torch's, all in bytes; each has a current and a peak value."""
EVENTS = (
    "num_alloc_retries",
    "num_ooms",
    "num_sync_all_streams",
    "num_device_alloc",
    "num_device_free",
)
HOST_LEVELS = {"allocated": "allocated_bytes", "active": "active_bytes"}
HOST_EVENTS = ("num_host_alloc", "num_host_free")
HOST_TIMES = {"alloc": "host_alloc_time", "free": "host_free_time"}
"""Time in the driver's calls, µs."""


def device_memory(kind: str, namespace: Any) -> list[dict[str, Any]]:
    """Return what the allocator of each device holds that has ever held anything."""
    found = []
    for index in range(namespace.device_count()):
        stats = namespace.memory.memory_stats_as_nested_dict(index)
        if _of(stats, "reserved_bytes", "peak"):
            name = device_name(kind, namespace, index)
            found.append({"device": name, **_device_reading(stats)})
    return found


def _device_reading(stats: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "bytes": _levels(stats, LEVELS, "current"),
        "peak_bytes": _levels(stats, LEVELS, "peak"),
        "events": {name: stats[name] for name in EVENTS if name in stats},
    }


def pinned_memory(namespace: Any) -> dict[str, Any] | None:
    """Return what the allocator of pinned host memory holds; None where this torch does not tell."""
    read = getattr(namespace.memory, "host_memory_stats_as_nested_dict", None)
    stats = read() if read is not None else None
    if not stats:
        return None
    return {
        # Of pinned memory torch gives sums alone, of device memory by pool, `all` among them.
        "bytes": _levels(stats, HOST_LEVELS, "current"),
        "peak_bytes": _levels(stats, HOST_LEVELS, "peak"),
        "events": {name: stats[name] for name in HOST_EVENTS if name in stats},
        "time_us": {
            word: stats[key]["total"]
            for word, key in HOST_TIMES.items()
            if "total" in stats.get(key, ())
        },
    }


def _levels(stats: Mapping[str, Any], names: Mapping[str, str], which: str) -> dict[str, int]:
    found = {word: _of(stats, key, which) for word, key in names.items()}
    return {word: value for word, value in found.items() if value is not None}


def _of(stats: Mapping[str, Any], key: str, which: str) -> int | None:
    of_pools = stats.get(key)
    if not isinstance(of_pools, Mapping):
        return None
    value = of_pools.get("all", of_pools).get(which)
    return value if isinstance(value, int) else None


# The probe's `torch`: what torch holds on its devices, and the device time of stages so far.
#
# The first question that finds a device in use also begins the taking of device times, and the
# watch for running out of memory. torch is looked up among the loaded modules, never imported, and
# a device that the server has not begun to use is not begun.


NONE, WAITING, IN_USE = "none", "waiting", "in use"


def torch_answer(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Return state and, where a device is in use, sums and levels; times are monotonic ns."""
    return readings(sys.modules.get("torch"), asker)


def state(torch: Any) -> str:
    """Return whether *torch* uses a device, could still begin to, or has none to use."""
    if not hasattr(torch, "version"):
        return NONE  # Not loaded, or only half by now.
    if in_use(torch) is not None:
        return IN_USE
    return WAITING if possible(torch) else NONE


def readings(torch: Any, asker: Connection) -> Mapping[str, Any]:
    """Read *torch*."""
    now_ns = asker.recorder.clock()
    if (present := state(torch)) != IN_USE or (found := in_use(torch)) is None:
        return {"state": present, "at_ns": now_ns}
    kind, namespace = found
    times = device_time(kind, namespace)
    watch_memory(torch, kind, namespace, asker.recorder)
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


# The probe's `accelerator`: what torch tells of this process's devices, whoever made them.
#
# It neither loads torch nor initialises a device: a process that has done neither has no devices.


T = TypeVar("T")


def accelerator_answer(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Return the devices as `torch` names them, with what their allocators and their driver tell."""
    torch = sys.modules.get("torch")
    accelerator = getattr(torch, "accelerator", None)  # torch 2.6 and later
    if torch is None or accelerator is None or not accelerator.is_available():
        return {"devices": []}
    kind = accelerator.current_accelerator().type
    module: Any = getattr(torch, kind, None)
    if not getattr(module, "is_initialized", lambda: True)():
        return {"devices": []}  # it may be about to fork, and initialised parents break children
    platform = "hip" if getattr(torch.version, "hip", None) else kind
    return {
        "devices": [
            {
                "device": _known(device_name, kind, module, index) or f"{kind}:{index}",
                "name": _known(lambda at: module.get_device_name(at), index) or kind,
                "platform": platform,
                "ordinal": index,
                **_device_reading(_stats(accelerator, module, index)),
                **_driver_memory(accelerator, index),
            }
            for index in range(accelerator.device_count())
        ]
    }


def _stats(accelerator: Any, module: Any, index: int) -> Mapping[str, Any]:
    """Return what the allocator of a device says; of a back end without more, what it reserved."""
    if stats := _known(lambda: module.memory.memory_stats_as_nested_dict(index)):
        return dict(stats)
    flat = _known(lambda: accelerator.memory_stats(index)) or {}
    return {"reserved_bytes": {"current": flat.get("reserved_bytes.all.current")}}


def _driver_memory(accelerator: Any, index: int) -> dict[str, int]:
    """Return what is in use on a device, of all processes, and how much there is."""
    if free_and_total := _known(lambda: accelerator.get_memory_info(index)):
        free, total = free_and_total
        return {"used_bytes": total - free, "total_bytes": total}
    return {}


def _known(ask: Callable[..., T], *about: Any) -> T | None:
    """Ask a back end; those that lack it raise, each in its own way."""
    try:
        return ask(*about)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
