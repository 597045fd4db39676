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


def device_memory(kind: str, namespace: Any, driver: Any = None) -> list[dict[str, Any]]:
    """Return what the allocator of each device holds that has ever held anything.

    With *driver*, `torch.accelerator`: of every device, and also what it is and how much of it is
    in use by all processes.
    """
    found = []
    for index in range((driver or namespace).device_count()):
        stats = _stats(namespace, driver, index)
        if driver or _of(stats, "reserved_bytes", "peak"):
            name = _known(device_name, kind, namespace, index) or f"{kind}:{index}"
            told = _described(kind, namespace, driver, index) if driver else {}
            found.append({"device": name, **_device_reading(stats), **told})
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
# torch is looked up among the loaded modules, never imported, and a device that the server has not
# begun to use is not begun.


NONE, WAITING, IN_USE = "none", "waiting", "in use"
T = TypeVar("T")


def torch_answer(question: Mapping[str, Any], asker: Connection) -> Mapping[str, Any]:
    """Return state and, where a device is in use, sums and levels; times are monotonic ns.

    The first plain question that finds a device in use also begins the taking of device times, and
    the watch for running out of memory. `"driver": true` asks instead for every device that
    torch knows, whoever made it, with its name and what its driver tells of its memory.
    """
    torch = sys.modules.get("torch")
    answer: dict[str, Any] = {"state": state(torch), "at_ns": asker.recorder.clock()}
    if question.get("driver"):
        return answer | {"memory": _every_device(torch)}
    if (found := in_use(torch)) is None:
        return answer
    kind, namespace = found
    times = device_time(kind, namespace)
    watch_memory(torch, kind, namespace, asker.recorder)
    sums = times.sums() if times is not None else None
    return {**answer, "kind": kind, "times": sums, **_memory(kind, namespace)}


def state(torch: Any) -> str:
    """Return whether *torch* uses a device, could still begin to, or has none to use."""
    if not hasattr(torch, "version"):
        return NONE  # Not loaded, or only half by now.
    if in_use(torch) is not None:
        return IN_USE
    return WAITING if possible(torch) else NONE


def _memory(kind: str, namespace: Any) -> Mapping[str, Any]:
    try:
        return {"memory": device_memory(kind, namespace), "pinned": pinned_memory(namespace)}
    except RuntimeError as refusal:  # An allocator that was plugged in tells nothing.
        return {"memory": [], "pinned": None, "why_no_memory": str(refusal).partition("\n")[0]}


def _every_device(torch: Any) -> list[dict[str, Any]]:
    driver = getattr(torch, "accelerator", None)  # torch 2.6 and later
    if driver is None or not driver.is_available():
        return []
    kind = driver.current_accelerator().type
    namespace: Any = getattr(torch, kind, None)
    if not getattr(namespace, "is_initialized", lambda: True)():
        return []  # it may be about to fork, and initialised parents break children
    platform = "hip" if getattr(torch.version, "hip", None) else kind
    return [one | {"platform": platform} for one in device_memory(kind, namespace, driver)]


def _stats(namespace: Any, driver: Any, index: int) -> Mapping[str, Any]:
    """Return what the allocator of a device says; of a back end without more, what it reserved."""
    if driver is None:
        stats: Mapping[str, Any] = namespace.memory.memory_stats_as_nested_dict(index)
        return stats
    if known := _known(lambda: namespace.memory.memory_stats_as_nested_dict(index)):
        return dict(known)
    flat = _known(lambda: driver.memory_stats(index)) or {}
    return {"reserved_bytes": {"current": flat.get("reserved_bytes.all.current")}}


def _described(kind: str, namespace: Any, driver: Any, index: int) -> dict[str, Any]:
    """Return what a device is, what of it is in use by all processes, and how much there is."""
    name = _known(lambda: namespace.get_device_name(index)) or kind
    told = {"name": name, "ordinal": index}
    if free_and_total := _known(lambda: driver.get_memory_info(index)):
        free, total = free_and_total
        told |= {"used_bytes": total - free, "total_bytes": total}
    return told


def _known(ask: Callable[..., T], *about: Any) -> T | None:
    """Ask a back end; those that lack it raise, each in its own way."""
    try:
        return ask(*about)
    except (AttributeError, NotImplementedError, RuntimeError):
        return None
